"""First layer of the introspective network H over contrast rows that are never stored.

``y[b, u] = sum_k d[b, k] sum_j V[u, k, j] h[b, j] + c[u]``, with ``V`` of shape ``(U, N * D)``: a product whose left
operand, the row ``d[b, k] h[b, j]``, is formed piece by piece.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrad.losses import compute_dtype

from .library import operator

# Elements of the left operand formed at a time.
_CHUNK = 1 << 20


def _add(out: Tensor | None, h: Tensor, d: Tensor, weight: Tensor) -> Tensor:
    """Add the product of some classes' rows, ``(B, n * D)``, and their part of the weight."""
    left, right = (d.unsqueeze(-1) * h.unsqueeze(-2)).flatten(1), weight.to(h.dtype).t()
    return left @ right if out is None else torch.addmm(out, left, right)


def eager(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(B, U)`` in float32 (float64 for float64), holding at most a few classes' rows at a time.

    With gradients wanted, these rows are formed again in the backward pass instead of being kept.
    """
    dtype = compute_dtype(features.dtype)
    h, d = features.to(dtype), diagonal.to(dtype)
    (batch, width), classes = h.shape, d.shape[1]
    out: Tensor | None = None if bias is None else bias.to(dtype)
    if torch.compiler.is_compiling():
        return _add(out, h, d, weight)
    add = _add
    if torch.is_grad_enabled() and any(t.requires_grad for t in (h, d, weight)):
        add = partial(checkpoint, _add, use_reentrant=False, preserve_rng_state=False)
    step = max(1, _CHUNK // max(batch * width, 1))
    for start in range(0, classes, step):
        stop = min(start + step, classes)
        out = add(out, h, d[:, start:stop], weight[:, start * width : stop * width])
    return h.new_zeros((batch, weight.shape[0])) if out is None else out


def _kernel(features: Tensor, diagonal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from .triton import rows as launcher

    return launcher.contrast_rows_linear(features, diagonal, weight, bias)


rows_linear = operator("rows_linear", eager, _kernel)
