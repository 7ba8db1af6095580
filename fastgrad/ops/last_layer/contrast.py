"""Squared norms of the last layer's gradients from its input and its logits: of every contrast, or of one label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad import losses
from fastgrad._torch import check, is_transformed
from fastgrad.ops.dispatch import operator

# Rows are worked on in pieces of at most this many elements (8 MiB), which stay in the outer cache of a CPU.
_CHUNK = 1 << 21
# Numbers whose largest is found at once.
_FEW = 1 << 16
# Longer rows have their normalisation corrected, which costs a few operations on one number a row.
_LONG = 1 << 12


def eager(features: Tensor, logits: Tensor, loss: str, bias: bool, log: bool, mean: bool) -> Tensor:
    """``||delta||^2 (||h||^2 + 1)`` of every contrast ``(B, N)``, without the 1 where there is no bias.

    The definition, differentiable to any order; for inference in fewer passes, in place where the memory is ours.
    """
    inference = not (torch.is_grad_enabled() and (features.requires_grad or logits.requires_grad))
    # vmap may map the features alone, which the softmax has then no room for.
    plain = torch.compiler.is_compiling() or not is_transformed()
    if inference and plain and loss == "cross_entropy" and not log and logits.numel():
        h = features.to(losses.compute_dtype(features.dtype))
        scale = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square()
        scale = scale + 1 if bias else scale
        scale = scale / logits.shape[-1] ** 2 if mean else scale
        return _cross_entropy(scale.to(losses.compute_dtype(logits.dtype)), logits)
    norms = losses.contrast_norms(logits, loss=loss, reduction=losses.REDUCTIONS[mean], log=log)
    scale = features.to(norms.dtype).square().sum(-1, keepdim=True) + (1 if bias else 0)
    return norms + scale.log() if log else norms * scale


def _cross_entropy(scale: Tensor, logits: Tensor) -> Tensor:
    dtype = losses.compute_dtype(logits.dtype)
    rows = max(1, _CHUNK // logits.shape[-1])
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or logits.shape[0] <= rows:
        return _in_place(torch.softmax(logits, -1, dtype=dtype), scale)
    out = torch.empty(logits.shape, dtype=dtype, device="cpu")
    for p, s, z in zip(out.split(rows), scale.split(rows), logits.split(rows), strict=True):
        _in_place(torch.softmax(z, -1, dtype=dtype, out=p), s)
    return out


def _in_place(p: Tensor, scale: Tensor) -> Tensor:
    """Turn the softmax into the squared norms where it lies."""
    top = _argmax(p)
    peak = p.gather(-1, top)
    p.scatter_(-1, top, 0)
    s1 = p.sum(-1, keepdim=True)
    length = torch.linalg.vector_norm(p, dim=-1, keepdim=True)
    slope = scale
    if p.shape[-1] > _LONG:
        # Softmax adds its N terms up one after another; the pairwise sum of its result corrects the norm to 1.
        norm = s1 + peak
        s1, length, slope = s1 / norm, length / norm, scale / norm
    s2 = length.square_()
    at_top = torch.addcmul(s2, s1, s1)
    # T + 1 with T = (1 - s1)^2 + s2.
    total = torch.add(at_top, s1, alpha=-2).add_(2)
    p.mul_(slope * -2).add_(total.mul_(scale))
    return p.scatter_(-1, top, at_top.mul_(scale))


def _argmax(p: Tensor) -> Tensor:
    """``p.argmax(-1, keepdim=True)`` of a matrix.

    On a CPU the maximum is vectorised and its index is not, so the index is looked for in one block of about
    ``sqrt(N)`` columns, the one with the largest maximum.
    """
    classes = p.shape[-1]
    if p.device.type != "cpu" or torch.compiler.is_compiling() or classes < 256 or p.numel() < _FEW:
        plain: Tensor = p.argmax(-1, keepdim=True)
        return plain
    width = 1 << (classes.bit_length() // 2)
    whole = classes // width * width
    best = p[:, :whole].unflatten(-1, (-1, width)).amax(-1)
    if whole < classes:
        best = torch.cat([best, p[:, whole:].amax(-1, keepdim=True)], -1)
    columns: Tensor = best.argmax(-1, keepdim=True) * width + torch.arange(width, device="cpu")
    # The last block may be short; repeating the last column does not move the first maximum.
    columns.clamp_(max=classes - 1)
    inside: Tensor = p.gather(-1, columns).argmax(-1, keepdim=True)
    return columns.gather(-1, inside)


def eager_target(
    features: Tensor, logits: Tensor, target: Tensor | None, kind: str, loss: str, bias: bool, log: bool, mean: bool
) -> Tensor:
    """The same of one label a sample, ``(B,)``, by definition. ``kind`` names a label without tensor."""
    label = kind if target is None else target
    norms = losses.target_norms(logits, label, loss=loss, reduction=losses.REDUCTIONS[mean], log=log)
    scale = features.to(norms.dtype).square().sum(-1) + (1 if bias else 0)
    return norms + scale.log() if log else norms * scale


def _fake(features: Tensor, logits: Tensor, *options: Any) -> Tensor:
    check(
        features.dim() == logits.dim() == 2 and features.shape[0] == logits.shape[0],
        lambda: (
            "features and logits must be matrices with one row a sample; "
            f"their shapes were {tuple(features.shape)} and {tuple(logits.shape)}"
        ),
    )
    return logits.new_empty(logits.shape, dtype=losses.compute_dtype(logits.dtype))


def _fake_target(features: Tensor, logits: Tensor, *options: Any) -> Tensor:
    return _fake(features, logits).new_empty(logits.shape[:1])


contrast_sqnorm = operator("contrast_sqnorm", "contrast", eager, _fake)
target_sqnorm = operator("target_sqnorm", "target", eager_target, _fake_target)
