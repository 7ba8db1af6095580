"""In other libraries: pytorch-ood's interface for a `TwoStageModel`, and its gradient detectors by exact rules.

``GradNorm`` and ``GradUncertainty`` derive from pytorch-ood's classes, and it is imported where one is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgrad.checks import extra
from fastgrad.interop.two_stage import as_pytorch_ood

if TYPE_CHECKING:
    from fastgrad.interop.gradients import GradNorm, GradUncertainty

__all__ = ["GradNorm", "GradUncertainty", "as_pytorch_ood"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastgrad.interop' has no attribute {name!r}")
    with extra("interop"):
        from fastgrad.interop import gradients
    return getattr(gradients, name)
