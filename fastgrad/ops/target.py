"""Squared norm of the last layer's gradient for one label a sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgrad import losses
from fastgrad.ops.library import operator


def eager(
    features: Tensor,
    logits: Tensor,
    target: Tensor | None,
    kind: str,
    bias: bool,
    loss: str,
    reduction: str,
    log: bool,
) -> Tensor:
    """The definition in plain torch, ``(B,)``; differentiable to any order. ``kind`` names a label without tensor."""
    label = kind if target is None else target
    norms = losses.target_norms(logits, label, loss=loss, reduction=reduction, log=log)
    scale = features.to(norms.dtype).square().sum(-1) + (1 if bias else 0)
    return norms + scale.log() if log else norms * scale


def _kernel(*arguments: Any) -> Tensor:
    from fastgrad.ops.triton import target as launcher

    features, logits, target, kind, bias, loss, reduction, log = arguments
    return launcher.target_sqnorm(features, logits, target, kind, loss, bias, log, reduction == "mean")


target_sqnorm = operator("target_sqnorm", eager, _kernel)
