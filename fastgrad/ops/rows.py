"""First layer of the introspective network H over contrast rows that are never stored.

``y[b, u] = sum_k d[b, k] sum_j V[u, k, j] h[b, j] + c[u]``, with ``V`` of shape ``(U, N * D)``: a product whose left
operand, the row ``d[b, k] h[b, j]``, is formed piece by piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.losses import compute_dtype

from . import library  # noqa: F401  (defines the schema)
from .implementation import choose

# Elements of the left operand formed at a time.
_CHUNK = 1 << 20


def _classes_at_a_time(batch: int, width: int, classes: int) -> int:
    return max(1, min(classes, _CHUNK // max(batch * width, 1)))


def _piece(features: Tensor, diagonal: Tensor) -> Tensor:
    """Rows of some classes, ``(B, n * D)``."""
    return (diagonal.unsqueeze(-1) * features.unsqueeze(-2)).flatten(1)


def eager(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(B, U)`` in float32 (float64 for float64), holding at most a few classes' rows at a time."""
    dtype = compute_dtype(features.dtype)
    h, d = features.to(dtype), diagonal.to(dtype)
    width, classes = h.shape[1], d.shape[1]
    step = classes if torch.compiler.is_compiling() else _classes_at_a_time(h.shape[0], width, classes)
    out: Tensor | None = None if bias is None else bias.to(dtype)
    for start in range(0, classes, step):
        stop = min(start + step, classes)
        right = weight[:, start * width : stop * width].to(dtype).t()
        left = _piece(h, d[:, start:stop])
        out = left @ right if out is None else torch.addmm(out, left, right)
    return h.new_zeros((h.shape[0], weight.shape[0])) if out is None else out


def _forward(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    if choose(impl, features) == "eager":
        return eager(features, diagonal, weight, bias)
    from .triton import rows as launcher

    return launcher.contrast_rows_linear(features, diagonal, weight, bias)


torch.library.impl("fastgrad::rows_linear", "CompositeExplicitAutograd", _forward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, diagonal, weight, bias, _ = inputs
    ctx.save_for_backward(features, diagonal, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Forms the rows again in pieces, so that training H needs no ``(B, N, D)`` either."""
    features, diagonal, weight = ctx.saved_tensors
    dtype = grad.dtype
    h, d = features.to(dtype), diagonal.to(dtype)
    width, classes = h.shape[1], d.shape[1]
    step = classes if torch.compiler.is_compiling() else _classes_at_a_time(h.shape[0], width, classes)
    grad_h = torch.zeros_like(h)
    grad_d, grad_weight = [], []
    for start in range(0, classes, step):
        stop = min(start + step, classes)
        part = d[:, start:stop]
        right = weight[:, start * width : stop * width].to(dtype)
        grad_rows = (grad @ right).unflatten(1, (stop - start, width))
        grad_d.append(torch.linalg.vecdot(grad_rows, h.unsqueeze(1)))
        grad_h = grad_h + (grad_rows * part.unsqueeze(-1)).sum(1)
        if ctx.needs_input_grad[2]:
            grad_weight.append(grad.t() @ _piece(h, part))
    return (
        grad_h.to(features.dtype),
        torch.cat(grad_d, 1).to(diagonal.dtype) if grad_d else torch.zeros_like(diagonal),
        torch.cat(grad_weight, 1).to(weight.dtype) if grad_weight else None,
        None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype),
        None,
    )


torch.library.register_autograd("fastgrad::rows_linear", _backward, setup_context=_setup)


def rows_linear(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    """Route to the implementation that serves the tensors, through the operator where gradients are wanted."""
    chosen = choose(impl, features)
    inputs = [t for t in (features, diagonal, weight, bias) if t is not None]
    if chosen == "triton" or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        result: Tensor = torch.ops.fastgrad.rows_linear(features, diagonal, weight, bias, chosen)
        return result
    return eager(features, diagonal, weight, bias)
