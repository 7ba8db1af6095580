"""Sum of squares of every channel of every sample of an activation, ``sum_t x[b, c, t]^2``.

A traced graph holds plain ATen reductions, which a compiler fuses with the operation that makes ``x``. Elsewhere it
runs at the speed of memory: ``square().sum()`` would write all squares to it, so squares are taken without a temporary,
or in one that stays in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import is_readable, is_traced
from fastgrad.losses import compute_dtype

#: Numbers that stay in one core's second-level cache beside as many that stream through it.
CACHED = 1 << 17
#: Squares that may be added in a row: equal ones round alike, and the errors add up.
LONGEST_RUN = 512
#: Shorter pieces of a channel cost more to start than its squares cost to write to the cache.
SHORTEST_RUN = 64


def canonical(x: Tensor, dim: int) -> Tensor:
    """The view ``(B, C, ...)`` with at least one axis of positions."""
    if dim not in (1, 1 - x.dim()):
        x = x.movedim(dim, 1)
    return x.unsqueeze(2) if x.dim() == 2 else x


def _in_one_piece(x: Tensor) -> bool:
    """Whether the operations become nodes of a graph, or there is nothing in the tensor."""
    return not is_readable(x) or (torch.is_grad_enabled() and x.requires_grad) or x.numel() == 0


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """``x`` in ``dtype``, without a node in the graph where it is in it already."""
    return x if x.dtype == dtype else x.to(dtype)


def _cached() -> int:
    """Numbers that the caches of all threads hold."""
    return CACHED * torch.get_num_threads()


def _by_samples(x: Tensor, dtype: torch.dtype, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """``reduce`` of ``x`` in ``dtype``, converted as many samples at a time as stay in the cache."""
    if x.dtype == dtype:
        return reduce(x)
    samples = max(1, _cached() // x[0].numel())
    return torch.cat([reduce(part.to(dtype)) for part in x.split(samples)])


def _total(x: Tensor) -> Tensor:
    """The sum over the positions, of many in two steps: Inductor adds them in a row, where ATen keeps to a tree."""
    others = tuple(range(2, x.dim() - 1))
    if others and is_traced() and x.device.type == "cpu" and not _few(x.shape[2:]):
        return x.sum(-1).sum(others)
    return x.sum((*others, -1))


def _few(positions: torch.Size) -> bool:
    """Whether so few positions may be added one after the other; of a symbolic number nobody knows."""
    return all(isinstance(n, int) for n in positions) and math.prod(positions) <= LONGEST_RUN


def _squares(x: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    if not _in_one_piece(x):
        if x.device.type != "cpu":
            return _squares_at_once(x, dtype)
        flat = x.flatten(2)
        run = _run(flat.shape[2])
        if run and flat.stride(2) == 1:
            return _by_samples(flat, dtype, lambda part: _squares_in_runs(part, run))
        if x.numel() > 2 * _cached():
            return _squares_in_blocks(flat, dtype)
    return _total(_in(dtype, x).square())


def _squares_at_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In one read by one reduction."""
    norms: Tensor = torch.linalg.vector_norm(x, 2, tuple(range(2, x.dim())), dtype=dtype)
    return norms.square_()


@functools.lru_cache
def _run(positions: int) -> int:
    """The longest run, neither too long nor too short, that divides the positions; 0 if there is none."""
    if positions <= LONGEST_RUN:
        return positions
    return max((n for n in range(SHORTEST_RUN, LONGEST_RUN + 1) if positions % n == 0), default=0)


def _squares_in_runs(x: Tensor, run: int) -> Tensor:
    """Of ``(B, C, T)`` with neighbouring positions: the squared norms of runs, added up."""
    count = x.shape[2] // run
    runs = x if count == 1 else x.view(*x.shape[:2], count, run)
    squares: Tensor = torch.linalg.vector_norm(runs, 2, -1).square_()
    return squares if count == 1 else squares.sum(2)


def _squares_in_blocks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of ``(B, C, T)`` with any strides: block after block of positions added to squares that stay in the cache."""
    rows = x.transpose(1, 2)
    batch, positions, channels = rows.shape
    # An eighth of the positions of as many samples as the cache takes; more positions where the batch is small.
    samples = min(batch, max(1, 8 * _cached() // (positions * channels)))
    step = max(1, min(positions, _cached() // (samples * channels)))
    kept = x.new_empty((samples, step, channels), dtype=dtype)
    totals = []
    for part in rows.split(samples):
        squares = kept[: part.shape[0]].zero_()
        for block in part.split(step, 1):
            block = block.to(dtype)
            squares[:, : block.shape[1]].addcmul_(block, block)
        totals.append(squares.sum(1))
    return torch.cat(totals)


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
