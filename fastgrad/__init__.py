"""Squared per-sample gradient norms, and a detector that says how far to trust a classifier's answer.

``__all__`` lists the public names. Importing the package imports only torch and numpy; Triton, scikit-learn and
everything else are imported where they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastgrad.gradients.contrasts import (
    ContrastStats,
    contrast_rows,
    contrast_rows_linear,
    contrast_sqnorm,
    contrast_stats,
    contrast_topk,
    linear_contrast_sqnorm,
    linear_contrast_stats,
    target_sqnorm,
)
from fastgrad.version import __version__ as __version__

if TYPE_CHECKING:
    from fastgrad import layers as layers
    from fastgrad.deploy.file.export import export
    from fastgrad.detector import UncertaintyDetector
    from fastgrad.detector.model import TwoStageModel
    from fastgrad.gradients.check import check
    from fastgrad.gradients.clipping import clip_gradients
    from fastgrad.gradients.features import GradientFeatures
    from fastgrad.gradients.gram import grad_gram, grad_square_sum
    from fastgrad.gradients.noise_scale import NoiseScale
    from fastgrad.gradients.project import grad_project
    from fastgrad.gradients.recorder import grad_sqnorm, record
    from fastgrad.gradients.store import GradientStore
    from fastgrad.introspection import IntrospectiveClassifier
    from fastgrad.metrics import certified_threshold, threshold_for

_LAZY = {
    "GradientFeatures": "fastgrad.gradients.features",
    "GradientStore": "fastgrad.gradients.store",
    "IntrospectiveClassifier": "fastgrad.introspection",
    "NoiseScale": "fastgrad.gradients.noise_scale",
    "TwoStageModel": "fastgrad.detector.model",
    "UncertaintyDetector": "fastgrad.detector",
    "certified_threshold": "fastgrad.metrics",
    "check": "fastgrad.gradients.check",
    "clip_gradients": "fastgrad.gradients.clipping",
    "export": "fastgrad.deploy.file.export",
    "grad_gram": "fastgrad.gradients.gram",
    "grad_project": "fastgrad.gradients.project",
    "grad_sqnorm": "fastgrad.gradients.recorder",
    "grad_square_sum": "fastgrad.gradients.gram",
    "record": "fastgrad.gradients.recorder",
    "threshold_for": "fastgrad.metrics",
}

__all__ = [
    "ContrastStats",
    "GradientFeatures",
    "GradientStore",
    "IntrospectiveClassifier",
    "NoiseScale",
    "TwoStageModel",
    "UncertaintyDetector",
    "certified_threshold",
    "check",
    "clip_gradients",
    "contrast_rows",
    "contrast_rows_linear",
    "contrast_sqnorm",
    "contrast_stats",
    "contrast_topk",
    "export",
    "grad_gram",
    "grad_project",
    "grad_sqnorm",
    "grad_square_sum",
    "linear_contrast_sqnorm",
    "linear_contrast_stats",
    "record",
    "target_sqnorm",
    "threshold_for",
]


def __getattr__(name: str) -> Any:
    if name == "layers":
        # Its documentation refers to fastgrad.layers.register_rule without a separate import.
        return importlib.import_module("fastgrad.layers")
    if name not in _LAZY:
        raise AttributeError(f"module 'fastgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
