"""Sum of squares of every channel of every sample of an activation, ``sum_t x[b, c, t]^2``.

A traced graph holds plain ATen reductions, which a compiler fuses with the operation that makes ``x``. Elsewhere the
squares of a few samples at a time go to memory that is used again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import is_readable, is_traced
from fastgrad.losses import compute_dtype

#: Numbers whose squares are held at once on a CPU: 4 MiB, beyond which fresh memory costs more than the squares.
HELD = 1 << 20
#: Squares that may be added in a row: equal ones round alike, and the errors add up.
LONGEST_RUN = 512


def canonical(x: Tensor, dim: int) -> Tensor:
    """The view ``(B, C, ...)`` with at least one axis of positions."""
    if dim not in (1, 1 - x.dim()):
        x = x.movedim(dim, 1)
    return x.unsqueeze(2) if x.dim() == 2 else x


def _in_one_piece(x: Tensor) -> bool:
    """Whether the operations become nodes of a graph or run on a GPU."""
    return not is_readable(x) or (torch.is_grad_enabled() and x.requires_grad) or x.device.type != "cpu"


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """``x`` in ``dtype``, without a node in the graph where it is in it already."""
    return x if x.dtype == dtype else x.to(dtype)


def _total(x: Tensor) -> Tensor:
    """The sum over the positions, of many in two steps: Inductor adds them in a row, where ATen keeps to a tree."""
    others = tuple(range(2, x.dim() - 1))
    if others and is_traced() and x.device.type == "cpu" and not _few(x.shape[2:]):
        return x.sum(-1).sum(others)
    return x.sum((*others, -1))


def _few(positions: torch.Size) -> bool:
    """Whether so few positions may be added one after the other; unknown for a symbolic number."""
    return all(isinstance(n, int) for n in positions) and math.prod(positions) <= LONGEST_RUN


def _squares(x: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    if _in_one_piece(x) or x.numel() <= HELD:
        return _total(_in(dtype, x).square())
    samples = max(1, HELD // x[0].numel())
    return torch.cat([_total(part.to(dtype).square()) for part in x.split(samples)])


def _checked(x: Tensor, dim: int) -> Tensor:
    """``x`` as ``(B, C, ...)``."""
    checks.is_float("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (B, C, ...) or (B, ..., C); its shape was {tuple(x.shape)}")
    if dim == 0 or not -x.dim() < dim < x.dim():
        raise ValueError(
            f"dim must be the dimension of the channels, 1 to {x.dim() - 1} or as far from the end; it was {dim!r}"
        )
    return canonical(x, dim)


def channel_square_sums(x: Tensor, dim: int = 1) -> Tensor:
    """Return every channel's sum of squares over its positions, for each sample.

    Args:
        x: ``(B, C, ...)``, or with ``dim=-1`` ``(B, ..., C)``: the dimensions other than the batch and the channels
            are positions, none of them for ``(B, C)``. Contiguous and channels-last tensors are read where they are.
        dim: Dimension of the channels, any but the batch.

    Returns:
        ``(B, C)``: float64 for float64, else float32. Zeros without positions.

    Raises:
        TypeError: If ``x`` is no floating tensor.
        ValueError: If ``x`` or ``dim`` is not as above.
    """
    return _squares(_checked(x, dim))
