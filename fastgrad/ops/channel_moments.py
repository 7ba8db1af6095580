"""Sum of squares of every channel of every sample of an activation, ``sum_t x[b, c, t]^2``.

A traced graph holds plain ATen reductions, which a compiler fuses with the operation that makes ``x``. Otherwise the
squares of a few samples at a time go to memory that is used again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgrad._torch import is_readable, is_traced
from fastgrad.losses import compute_dtype

#: Numbers whose squares are held at once on a CPU: 4 MiB, beyond which fresh memory costs more than the squares.
HELD = 1 << 20
#: Squares that may be added one after another: equal ones round alike, and the errors add up.
LONGEST_RUN = 512


def _squares(x: Tensor) -> Tensor:
    """Return the squares of ``(B, C, ...)`` summed over the positions."""
    dtype = compute_dtype(x.dtype)
    # No conversion is recorded in a graph if the dtype is right already.
    squares = (x if x.dtype == dtype else x.to(dtype)).square()
    others = tuple(range(2, x.dim() - 1))
    few = all(isinstance(n, int) for n in x.shape[2:]) and math.prod(x.shape[2:]) <= LONGEST_RUN
    if others and is_traced() and x.device.type == "cpu" and not few:
        # In two steps: Inductor adds numbers one after another, ATen in a tree.
        return squares.sum(-1).sum(others)
    return squares.sum((*others, -1))


def channel_square_sums(x: Tensor, dim: int = 1) -> Tensor:
    """Return every channel's sum of squares over its positions, for each sample: ``(B, C)``, zeros without positions.

    ``x`` is a floating tensor ``(B, C, ...)`` with its channels in ``dim``, any but dimension 0; all others are
    positions. Contiguous and channels-last tensors are not copied. The result is float64 for float64, else float32.
    """
    if dim not in (1, 1 - x.dim()):
        x = x.movedim(dim, 1)
    if x.dim() == 2:
        x = x.unsqueeze(2)
    # In one piece if a graph or a gradient is recorded, or on a GPU.
    whole = not is_readable(x) or (torch.is_grad_enabled() and x.requires_grad) or x.device.type != "cpu"
    if whole or x.numel() <= HELD:
        return _squares(x)
    return torch.cat([_squares(part) for part in x.split(max(1, HELD // x[0].numel()))])
