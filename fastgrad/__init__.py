"""Gradient-based uncertainty at the speed of inference.

The public names are listed in ``__all__``. Importing the package imports torch and numpy only; Triton, scikit-learn
and everything else is imported where it is first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from fastgrad._moved import MovedFinder
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
    from fastgrad import layers as layers
    from fastgrad.deploy.export import export
    from fastgrad.estimators import IntrospectiveClassifier, UncertaintyDetector
    from fastgrad.features import GradientFeatures
    from fastgrad.metrics import threshold_for
    from fastgrad.recorder import grad_sqnorm, record
    from fastgrad.training.clipping import clip_gradients
    from fastgrad.training.noise_scale import NoiseScale
    from fastgrad.training.ranking import SampleTable, rank_samples
    from fastgrad.two_stage import TwoStageModel

__version__ = "0.1.0"

_LAZY = {
    "GradientFeatures": "fastgrad.features",
    "IntrospectiveClassifier": "fastgrad.estimators",
    "NoiseScale": "fastgrad.training.noise_scale",
    "SampleTable": "fastgrad.training.ranking",
    "TwoStageModel": "fastgrad.two_stage",
    "UncertaintyDetector": "fastgrad.estimators",
    "clip_gradients": "fastgrad.training.clipping",
    "export": "fastgrad.deploy.export",
    "grad_sqnorm": "fastgrad.recorder",
    "rank_samples": "fastgrad.training.ranking",
    "record": "fastgrad.recorder",
    "threshold_for": "fastgrad.metrics",
}

__all__ = [
    "ContrastStats",
    "GradientFeatures",
    "IntrospectiveClassifier",
    "NoiseScale",
    "SampleTable",
    "TwoStageModel",
    "UncertaintyDetector",
    "clip_gradients",
    "contrast_rows",
    "contrast_rows_linear",
    "contrast_sqnorm",
    "export",
    "grad_sqnorm",
    "linear_contrast_sqnorm",
    "linear_contrast_stats",
    "rank_samples",
    "record",
    "target_sqnorm",
    "threshold_for",
]


def __getattr__(name: str) -> Any:
    if name == "layers":
        # Its documentation says fastgrad.layers.register_rule.
        return importlib.import_module("fastgrad.layers")
    if name not in _LAZY:
        raise AttributeError(f"module 'fastgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# First in line: the modules of a moved package would else be found once more, under their old names.
sys.meta_path.insert(0, MovedFinder())
