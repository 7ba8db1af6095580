"""First layer of the introspective network H over contrast rows that are never stored.

``y[b, u] = sum_k d[b, k] sum_j V[u, k, j] h[b, j] + c[u]``, with ``V`` of shape ``(U, N * D)``: a product whose left
operand, the row ``d[b, k] h[b, j]``, is formed piece by piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.losses import compute_dtype
from fastgrad.ops.library import operator

# Elements of the left operand formed at a time.
_CHUNK = 1 << 20


def _pieces(h: Tensor, d: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Some classes of ``d`` at a time and their part of the weight."""
    step = d.shape[1]
    if not torch.compiler.is_compiling():
        step = max(1, min(step, _CHUNK // max(h.numel(), 1)))
    if step >= d.shape[1]:
        return [(d, weight.to(h.dtype))]
    parts = weight.split(step * h.shape[1], 1)
    return [(some, part.to(h.dtype)) for some, part in zip(d.split(step, 1), parts, strict=True)]


def _rows(h: Tensor, d: Tensor) -> Tensor:
    """Rows of some classes, ``(B, n * D)``."""
    return (d.unsqueeze(-1) * h.unsqueeze(-2)).flatten(1)


def _product(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(features.dtype)
    h, d = features.to(dtype), diagonal.to(dtype)
    out: Tensor | None = None if bias is None else bias.to(dtype)
    for some, part in _pieces(h, d, weight):
        left = _rows(h, some)
        out = left @ part.t() if out is None else torch.addmm(out, left, part.t())
    assert out is not None
    return out


def _derivative(
    wanted: tuple[bool, ...],
    grad: Tensor,
    features: Tensor,
    diagonal: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Forms the rows again in pieces, so that training H needs no ``(B, N, D)`` either."""
    h, d = features.to(grad.dtype), diagonal.to(grad.dtype)
    grad_h, grad_d, grad_weight = torch.zeros_like(h), [], []
    for some, part in _pieces(h, d, weight):
        if wanted[0] or wanted[1]:
            grad_rows = (grad @ part).unflatten(1, (some.shape[1], h.shape[1]))
            grad_d.append(torch.linalg.vecdot(grad_rows, h.unsqueeze(1)))
            grad_h = grad_h + (grad_rows * some.unsqueeze(-1)).sum(1)
        if wanted[2]:
            grad_weight.append(grad.t() @ _rows(h, some))
    return (
        grad_h.to(features.dtype) if wanted[0] else None,
        torch.cat(grad_d, 1).to(diagonal.dtype) if wanted[1] else None,
        torch.cat(grad_weight, 1).to(weight.dtype) if wanted[2] else None,
        None if bias is None else grad.sum(0).to(bias.dtype),
    )


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs)
        return _product(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _derivative(ctx.needs_input_grad, grad, *ctx.saved_tensors)


def eager(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(B, U)`` in float32 (float64 for float64), holding at most a few classes' rows at a time."""
    inputs = [t for t in (features, diagonal, weight, bias) if t is not None]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if trained and not torch.compiler.is_compiling():
        result: Tensor = _Rows.apply(features, diagonal, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _product(features, diagonal, weight, bias)


def _kernel(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from fastgrad.ops.triton import rows as launcher

    return launcher.contrast_rows_linear(features, diagonal, weight, bias)


rows_linear = operator("rows_linear", eager, _kernel, _derivative)
