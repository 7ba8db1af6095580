"""One-class scores, one a file: how far a sample lies from clean data, and what that means as a p-value.

A higher score is less usual. Every score is a traceable module (`fitted.Fitted`) with a ``fit`` that takes rows
of clean data; `rows.Rows` makes those rows from a block of features, `conformal` turns scores into p-values.
"""

from __future__ import annotations

from fastgrad.scores.conformal import OneSided, TwoSided, UpperTail
from fastgrad.scores.fitted import Fitted, Sequence, rebuild
from fastgrad.scores.logits import Energy, Margin
from fastgrad.scores.mahalanobis import Mahalanobis
from fastgrad.scores.rows import Rows
from fastgrad.scores.temperature import Temperature

__all__ = [
    "Energy",
    "Fitted",
    "Mahalanobis",
    "Margin",
    "OneSided",
    "Rows",
    "Sequence",
    "Temperature",
    "TwoSided",
    "UpperTail",
    "rebuild",
]
