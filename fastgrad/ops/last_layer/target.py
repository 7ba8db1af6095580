"""Squared norm of the last layer's gradient for one label a sample."""

from __future__ import annotations

from torch import Tensor

from fastgrad import losses
from fastgrad.ops.dispatch import launcher, operator


def eager(
    features: Tensor, logits: Tensor, target: Tensor | None, kind: str, loss: str, bias: bool, log: bool, mean: bool
) -> Tensor:
    """The definition in plain torch, ``(B,)``; differentiable to any order. ``kind`` names a label without tensor."""
    label = kind if target is None else target
    norms = losses.target_norms(logits, label, loss=loss, reduction=losses.REDUCTIONS[mean], log=log)
    scale = features.to(norms.dtype).square().sum(-1) + (1 if bias else 0)
    return norms + scale.log() if log else norms * scale


target_sqnorm = operator("target_sqnorm", eager, launcher("target", "target_sqnorm"))
