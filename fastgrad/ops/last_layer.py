"""Operators of the last layer, from features and logits or from features and weight: eager forms, shapes, operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fastgrad import losses
from fastgrad._torch import is_readable, is_transformed
from fastgrad.losses import compute_dtype
from fastgrad.ops.dispatch import full_precision, operator

# Logits, elements of rows (B, N, D) or of products (B, U, N) held at a time, or one row if it is longer. On a GPU, a
# product of few rows would wait for the weight.
_CHUNK, _GPU_CHUNK = 1 << 22, 1 << 26
# Rows are worked on in pieces of at most this many elements (1 MiB), which stay in the cache of one core.
_CACHED = 1 << 18
# NumPy takes less time for a single row up to this length.
_FEW = 1 << 14
# Lower bounds of the exponentials' arguments: smaller terms vanish beside 1, and denormal numbers are slow.
_LEAST = {torch.float32: -87.33, torch.float64: -708.0}


def _contrasts(features: Tensor, logits: Tensor, loss: str, bias: bool, log: bool, mean: bool) -> Tensor:
    """Return ``||delta||^2 (||h||^2 + 1)`` of every contrast ``(B, N)``, without the 1 if there is no bias.

    The definition is differentiable to any order; inference takes fewer passes, in place in memory of its own.
    """
    inference = not (torch.is_grad_enabled() and (features.requires_grad or logits.requires_grad))
    # vmap may map only the features, and the softmax then has no room for the mapped norms.
    if inference and not is_transformed() and loss == "cross_entropy" and not log and logits.numel():
        return _cross_entropy(features, logits, bias, mean)
    norms = losses.contrast_norms(logits, loss=loss, reduction=losses.REDUCTIONS[mean], log=log)
    scale = features.to(norms.dtype).square().sum(-1, keepdim=True) + (1 if bias else 0)
    return norms + scale.log() if log else norms * scale


def _cross_entropy(features: Tensor, logits: Tensor, bias: bool, mean: bool) -> Tensor:
    """Return the norms for cross-entropy by few passes over the logits; on a CPU, over rows that fit the cache."""
    dtype, classes = compute_dtype(logits.dtype), logits.shape[-1]
    extra, divisor = int(bias), classes**2 if mean else 1
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _formula(features.to(dtype), logits.to(dtype), extra) / divisor
    readable = logits.device.type == "cpu" and is_readable(logits, features)
    if readable and logits.shape[0] == 1 and classes <= _FEW:
        return _one_row(features.detach(), logits.detach(), dtype, extra, divisor)
    factor = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=dtype).square_()
    factor = factor + 1 if bias else factor
    factor = factor / divisor if mean else factor
    rows = max(1, _CACHED // classes)
    if not readable or logits.shape[0] <= rows:
        return _rows(factor, logits)
    out = torch.empty(logits.shape, dtype=dtype, device="cpu")
    for f, z, o in zip(factor.split(rows), logits.split(rows), out.split(rows), strict=True):
        _rows(f, z, o)
    return out


def _formula(h: Tensor, z: Tensor, extra: int) -> Tensor:
    """Return the norms in few operations, which a compiler fuses to one kernel; `_rows` has the letters."""
    m = z.amax(-1, keepdim=True)
    e, top = torch.exp(z - m), z == m
    rest, ties = torch.where(top, 0.0, e), top.to(z.dtype).sum(-1, keepdim=True) - 1
    s1, s2 = rest.sum(-1, keepdim=True) + ties, rest.square().sum(-1, keepdim=True) + ties
    a = 1 + s1 + 0 * m  # NaN if the softmax is undefined
    return (h.square().sum(-1, keepdim=True) + extra) * ((s1 * s1 + s2) / (a * a) + 2 * (1 - e) / a)


def _rows(factor: Tensor, logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``factor (P + 2 (1 - e_k) / a)`` of rows, with ``e = exp(z - max z)`` and ``a = sum e``.

    No term is negative, so nothing cancels. P, the value of the largest logit, follows from the sums of e and e^2
    without one maximum. All passes write to the memory of the result.
    """
    least = _LEAST[factor.dtype]
    e = torch.sub(logits, logits.amax(-1, keepdim=True).to(factor.dtype), out=out).clamp_(min=least).exp_()
    total = e.sum(-1, keepdim=True)
    e.frac_()  # only maxima are 1: now only they are 0
    s1, s2 = e.sum(-1, keepdim=True), torch.linalg.vector_norm(e, dim=-1, keepdim=True).square_()
    e = torch.threshold_(e, 0, 1)
    ties = total.sub_(s1).round_().sub_(1)
    s1.add_(ties)
    s2.add_(ties).addcmul_(s1, s1)
    a = s1.add_(1)
    unit = factor / a
    return e.sub_(1).mul_(unit * -2).add_(s2.mul_(unit).div_(a))


def _one_row(h: Tensor, z: Tensor, dtype: torch.dtype, extra: int, divisor: int) -> Tensor:
    """Return the norms of one row by calls of NumPy, which cost at most a fifth of PyTorch's."""
    out = torch.softmax(z, -1, dtype=dtype)
    p = out.numpy()[0]
    top = p.argmax()
    peak, p[top] = float(p[top]), 0
    wide, h = p.astype(np.float64), h.to(dtype).numpy()[0].astype(np.float64)
    s1, s2 = float(wide.sum()), float(wide.dot(wide))
    # Sums of the softmax in float32 may be off for long rows.
    norm = s1 + peak
    s1, s2, peak = s1 / norm, s2 / norm / norm, peak / norm
    factor = (float(h.dot(h)) + extra) / divisor
    with np.errstate(all="ignore"):
        p *= -2 * factor / norm
        p += factor * (s2 + peak * peak + 1)
        p[top] = factor * (s1 * s1 + s2)
    return out


def _target(
    features: Tensor, logits: Tensor, target: Tensor | None, kind: str, loss: str, bias: bool, log: bool, mean: bool
) -> Tensor:
    """Return the norms ``(B,)`` of a label per sample by their definition; ``kind`` names a label without a tensor.

    Class indices may be ``(B, K)``, and the norms are then, too.
    """
    rows = max(1, _CACHED // 4 // max(logits.shape[-1], 1))
    if logits.device.type == "cpu" and is_readable(logits, features) and not is_transformed() and len(logits) > rows:
        labels = [None] * -(-len(logits) // rows) if target is None else target.split(rows)
        pieces = zip(features.split(rows), logits.split(rows), labels, strict=True)
        return torch.cat([_target(*piece, kind, loss, bias, log, mean) for piece in pieces])
    label = kind if target is None else target
    scale = features.to(compute_dtype(logits.dtype)).square().sum(-1) + (1 if bias else 0)
    if kind == "indices" and target is not None and target.dim() == 2:
        norms = losses.contrast_norms(logits, loss=loss, reduction=losses.REDUCTIONS[mean], log=log).gather(1, target)
        scale = scale.unsqueeze(1)
    else:
        norms = losses.target_norms(logits, label, loss=loss, reduction=losses.REDUCTIONS[mean], log=log)
    return norms + scale.log() if log else norms * scale


def _statistics(features: Tensor, logits: Tensor, loss: str, bias: bool, mean: bool) -> Tensor:
    """Return min, max, mean, expected and predicted norm, ``(B, 5)``; where values are known, a few rows at a time."""
    rows = max(1, _CHUNK // max(logits.shape[-1], 1))
    if is_readable(logits, features) and not is_transformed() and len(logits) > rows:
        pieces = zip(features.split(rows), logits.split(rows), strict=True)
        return torch.cat([_statistics(*piece, loss, bias, mean) for piece in pieces])
    norms = _contrasts(features, logits, loss, bias, False, mean)
    p = logits.to(norms.dtype).softmax(-1)
    predicted = norms.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    columns = (norms.amin(-1), norms.amax(-1), norms.mean(-1), (p * norms).sum(-1), predicted)
    return torch.stack(columns, -1)


def rows_linear(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer ``(U, N * D)`` to contrast rows ``diagonal (B, N) * features (B, D)``: ``(B, U)``.

    Large rows are never formed: the features are multiplied by the weight seen as ``(U N, D)``, some units at a time,
    and the diagonal weights the sum over classes. The result is float64 for float64, else float32.
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
target_sqnorm = operator(
    "target_sqnorm", _target, lambda h, z, *_: _empty(z, z.shape[0]),
    lambda h, z, y, kind, *_: "soft targets have no kernel" if kind == "soft" else None,
)  # fmt: skip
contrast_stats = operator("contrast_stats", _statistics, lambda h, z, *_: _empty(z, z.shape[0], 5))


def _linear_stats(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, mean: bool, impl: str
) -> Tensor:  # fmt: skip
    with full_precision(features.device):
        logits = linear(features, weight, bias)
    return contrast_stats(features, logits, loss, bias is not None, mean, impl)


def linear_contrast_stats(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, mean: bool, impl: str
) -> Tensor:
    """Return min, max, mean, expected and predicted norm of a linear layer, ``(B, 5)``, some rows at a time.

    A kernel that fused the product with the statistics would read its operands from the cache more often than the
    vendor's product, which costs more than the logits do: ``python -m bench.gpu.compile_report`` shows both times.
    """
    held = _GPU_CHUNK if features.device.type == "cuda" else _CHUNK
    rows = max(1, held // max(weight.shape[0], 1))
    if torch.compiler.is_compiling() or features.shape[0] <= rows:
        return _linear_stats(features, weight, bias, loss, mean, impl)
    return torch.cat(in_pieces(_linear_stats, features.split(rows), weight, bias, loss, mean, impl))


def linear_contrast_sqnorm(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, log: bool, mean: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """Return logits ``(B, N)`` of a linear layer and the norms of these logits' contrasts ``(B, N)``.

    The product is PyTorch's: a kernel that fused it with the norms would save a read of the logits, which takes less
    time than such a kernel's product loses against the vendor's.
    """
    with full_precision(features.device):
        logits = linear(features, weight, bias)
    return logits, contrast_sqnorm(features, logits, loss, bias is not None, log, mean, impl)
