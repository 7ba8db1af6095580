"""Operators of the last layer, from features and logits or from features and weight: eager forms, shapes, operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastgrad import losses
from fastgrad._torch import is_transformed
from fastgrad.losses import compute_dtype
from fastgrad.ops.dispatch import operator

# Logits, elements of rows (B, N, D) or of products (B, U, N) held at a time, or one row if it is longer.
_CHUNK = 1 << 22
# Rows are worked on in pieces of at most this many elements (8 MiB), which stay in the outer cache of a CPU.
_CACHED = 1 << 21
# Fewer numbers than this are searched for a row's largest at once.
_FEW = 1 << 16
# Longer rows have their normalisation corrected, which costs a few operations on one number per row.
_LONG = 1 << 12


def _contrasts(features: Tensor, logits: Tensor, loss: str, bias: bool, log: bool, mean: bool) -> Tensor:
    """Return ``||delta||^2 (||h||^2 + 1)`` of every contrast ``(B, N)``, without the 1 if there is no bias.

    The definition is differentiable to any order; inference takes fewer passes, in place in memory of its own.
    """
    inference = not (torch.is_grad_enabled() and (features.requires_grad or logits.requires_grad))
    # vmap may map only the features, and the softmax then has no room for the mapped norms.
    plain = torch.compiler.is_compiling() or not is_transformed()
    if inference and plain and loss == "cross_entropy" and not log and logits.numel():
        h = features.to(compute_dtype(features.dtype))
        scale = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square()
        scale = scale + 1 if bias else scale
        scale = scale / logits.shape[-1] ** 2 if mean else scale
        return _cross_entropy(scale.to(compute_dtype(logits.dtype)), logits)
    norms = losses.contrast_norms(logits, loss=loss, reduction=losses.REDUCTIONS[mean], log=log)
    scale = features.to(norms.dtype).square().sum(-1, keepdim=True) + (1 if bias else 0)
    return norms + scale.log() if log else norms * scale


def _cross_entropy(scale: Tensor, logits: Tensor) -> Tensor:
    dtype = compute_dtype(logits.dtype)
    rows = max(1, _CACHED // logits.shape[-1])
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
    """Return ``p.argmax(-1, keepdim=True)`` of a matrix.

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


def _target(
    features: Tensor, logits: Tensor, target: Tensor | None, kind: str, loss: str, bias: bool, log: bool, mean: bool
) -> Tensor:
    """Return the norms of one label per sample, ``(B,)``, by definition. ``kind`` names a label without tensor."""
    label = kind if target is None else target
    norms = losses.target_norms(logits, label, loss=loss, reduction=losses.REDUCTIONS[mean], log=log)
    scale = features.to(norms.dtype).square().sum(-1) + (1 if bias else 0)
    return norms + scale.log() if log else norms * scale


def _linear(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, log: bool, mean: bool
) -> tuple[Tensor, Tensor]:
    """Return logits in the dtype of the features, and the squared norms of exactly these (rounded) logits."""
    logits = linear(features, weight, bias)
    norms = _contrasts(features, logits, loss, bias is not None, log, mean)
    return logits, norms


def _statistics(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, mean: bool) -> Tensor:
    logits = linear(features, weight, bias)
    norms = _contrasts(features, logits, loss, bias is not None, False, mean)
    p = logits.to(norms.dtype).softmax(-1)
    predicted = norms.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    columns = (norms.amin(-1), norms.amax(-1), norms.mean(-1), (p * norms).sum(-1), predicted)
    return torch.stack(columns, -1)


def _linear_stats(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, mean: bool) -> Tensor:
    """Return min, max, mean, expected and predicted norm, ``(B, 5)``, a few rows at a time."""
    rows = max(1, _CHUNK // max(weight.shape[0], 1))
    if torch.compiler.is_compiling() or features.shape[0] <= rows:
        return _statistics(features, weight, bias, loss, mean)
    return torch.cat(in_pieces(_statistics, features.split(rows), weight, bias, loss, mean))


def rows_linear(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer ``(U, N * D)`` to contrast rows ``diagonal (B, N) * features (B, D)``: ``(B, U)``.

    Many rows are never formed. The features are multiplied by the weight seen as ``(U N, D)``, some units at a time,
    and the classes are summed with the diagonal as weights: as many operations. float64 for float64, else float32.
    """
    dtype = compute_dtype(features.dtype)
    h, d = features.to(dtype), diagonal.to(dtype)
    units = max(1, _CHUNK // max(d.numel(), 1))
    if not torch.compiler.is_compiling() and d.numel() * h.shape[1] <= _CHUNK:
        out = (d.unsqueeze(-1) * h.unsqueeze(-2)).flatten(1) @ weight.to(dtype).t()
    elif torch.compiler.is_compiling() or weight.shape[0] <= units:
        out = _some_units(weight, h, d)
    else:
        out = torch.cat(in_pieces(_some_units, weight.split(units), h, d), 1)
    return out if bias is None else out + bias.to(dtype)


def in_pieces(function: Callable[..., Tensor], pieces: Sequence[Tensor], *others: Any) -> list[Tensor]:
    """Return ``function(piece, *others)`` of each piece; a backward pass runs it again instead of storing results."""
    tensors = [x for x in (*pieces, *others) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        function = partial(checkpoint, function, use_reentrant=False)
    return [function(piece, *others) for piece in pieces]


def _some_units(weight: Tensor, h: Tensor, d: Tensor) -> Tensor:
    units, classes = weight.shape[0], d.shape[1]
    matrix = weight.to(h.dtype).unflatten(1, (classes, h.shape[1])).flatten(0, 1)
    products: Tensor = (h @ matrix.t()).unflatten(1, (units, classes)) * d.unsqueeze(1)
    return products.sum(-1)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Return norms without values, for logits of this dtype."""
    return like.new_empty(shape, dtype=compute_dtype(like.dtype))


contrast_sqnorm = operator("contrast_sqnorm", _contrasts, lambda h, z, *_: _empty(z, *z.shape))
target_sqnorm = operator("target_sqnorm", _target, lambda h, z, *_: _empty(z, z.shape[0]))
linear_contrast_sqnorm = operator(
    "linear_contrast_sqnorm", _linear,
    lambda h, w, *_: (h.new_empty((h.shape[0], w.shape[0])), _empty(h, h.shape[0], w.shape[0])),
)  # fmt: skip
linear_contrast_stats = operator("linear_contrast_stats", _linear_stats, lambda h, w, *_: _empty(h, h.shape[0], 5))
