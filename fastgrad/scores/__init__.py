"""One-class scores, one a file: how far a sample lies from clean data, and what that means as a p-value.

A higher score is less usual. Every score is a traceable module (`fitted.Fitted`) with a ``fit`` that takes rows
of clean data; `rows.Rows` makes those rows from a block of features, `conformal` turns scores into p-values.
"""

from __future__ import annotations

from .conformal import OneSided, TwoSided, UpperTail
from .fitted import Fitted, Sequence, rebuild
from .gaussian_mixture import GaussianMixture
from .logits import Energy, Margin
from .mahalanobis import Mahalanobis
from .neighbours import NearestNeighbours
from .rows import Rows
from .temperature import Temperature

__all__ = [
    "Energy",
    "Fitted",
    "GaussianMixture",
    "Mahalanobis",
    "Margin",
    "NearestNeighbours",
    "OneSided",
    "Rows",
    "Sequence",
    "Temperature",
    "TwoSided",
    "UpperTail",
    "rebuild",
]
