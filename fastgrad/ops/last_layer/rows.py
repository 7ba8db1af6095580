"""A linear layer over contrast rows, which are stored only where they are small.

``y[b, u] = sum_k d[b, k] sum_j V[u, k, j] h[b, j] + c[u]``. Many rows, ``(B, N, D)``, are never formed: ``h`` is
multiplied with ``V`` seen as ``(U N, D)``, and the classes are summed with the weights ``d``: as many operations.
"""

from __future__ import annotations

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
        out = _some_units(h, d, weight)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (features, diagonal, weight)):
        # Each part is computed again in the backward pass instead of being kept.
        parts = [checkpoint(_some_units, h, d, part, use_reentrant=False) for part in weight.split(units)]
        out = torch.cat(parts, 1)
    else:
        out = torch.cat([_some_units(h, d, part) for part in weight.split(units)], 1)
    return out if bias is None else out + bias.to(dtype)


def _some_units(h: Tensor, d: Tensor, weight: Tensor) -> Tensor:
    units, classes = weight.shape[0], d.shape[1]
    matrix = weight.to(h.dtype).unflatten(1, (classes, h.shape[1])).flatten(0, 1)
    products: Tensor = (h @ matrix.t()).unflatten(1, (units, classes)) * d.unsqueeze(1)
    return products.sum(-1)
