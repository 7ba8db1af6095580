"""Gradient-based uncertainty at the speed of inference.

The public names are listed in ``__all__``. Importing the package imports torch and numpy only; Triton, scikit-learn
and everything else is imported where it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported here and not on demand: importing the submodule later would put the module in the function's place.
from fastgrad.export import export
from fastgrad.functional import (
    ContrastStats,
    contrast_rows,
    contrast_rows_linear,
    contrast_sqnorm,
    linear_contrast_sqnorm,
    linear_contrast_stats,
    target_sqnorm,
)

if TYPE_CHECKING:
    from fastgrad.estimators import IntrospectiveClassifier, UncertaintyDetector
    from fastgrad.features import GradientFeatures
    from fastgrad.recorder import grad_sqnorm, record
    from fastgrad.two_stage import TwoStageModel

__version__ = "0.1.0"

_LAZY = {
    "GradientFeatures": "fastgrad.features",
    "IntrospectiveClassifier": "fastgrad.estimators",
    "TwoStageModel": "fastgrad.two_stage",
    "UncertaintyDetector": "fastgrad.estimators",
    "grad_sqnorm": "fastgrad.recorder",
    "record": "fastgrad.recorder",
}

__all__ = [
    "ContrastStats",
    "GradientFeatures",
    "IntrospectiveClassifier",
    "TwoStageModel",
    "UncertaintyDetector",
    "contrast_rows",
    "contrast_rows_linear",
    "contrast_sqnorm",
    "export",
    "grad_sqnorm",
    "linear_contrast_sqnorm",
    "linear_contrast_stats",
    "record",
    "target_sqnorm",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
