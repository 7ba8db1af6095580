"""A linear layer over contrast rows, which are stored only where they are small.

``y[b, u] = sum_k d[b, k] sum_j V[u, k, j] h[b, j] + c[u]``. Many rows, ``(B, N, D)``, are never formed: ``h`` is
multiplied with ``V`` seen as ``(U N, D)``, and the classes are summed with the weights ``d``: as many operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrad.losses import compute_dtype

# Elements of rows (B, N, D), or of products (B, U, N), held at a time.
_CHUNK = 1 << 22


def rows_linear(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(B, U)`` in float32 (float64 for float64), some units at a time.

    Args:
        features: ``(B, D)``, ``h``.
        diagonal: ``(B, N)``, ``d``.
        weight: ``(U, N * D)``, ``V``.
        bias: ``(U,)``, ``c``, or None.
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
    """``function(piece, *others)`` of each; where gradients are wanted it runs again in the backward pass.

    So nothing of a piece is kept but its result.
    """
    tensors = [x for x in (*pieces, *others) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        function = partial(checkpoint, function, use_reentrant=False)
    return [function(piece, *others) for piece in pieces]


def _some_units(weight: Tensor, h: Tensor, d: Tensor) -> Tensor:
    units, classes = weight.shape[0], d.shape[1]
    matrix = weight.to(h.dtype).unflatten(1, (classes, h.shape[1])).flatten(0, 1)
    products: Tensor = (h @ matrix.t()).unflatten(1, (units, classes)) * d.unsqueeze(1)
    return products.sum(-1)
