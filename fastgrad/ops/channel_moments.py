"""Sum and sum of squares of every channel of every sample: of an activation, or of the gradient at a layer's output.

    sum[b, c] = sum_t x[b, c, t]        sum_of_squares[b, c] = sum_t x[b, c, t]^2

On a GPU both come from one read, by the operator ``fastgrad::channel_moments``: a Triton kernel, which tracers cannot
see into. Elsewhere, and wherever a graph is traced, they are plain ATen reductions: a compiler takes both in one loop,
in the kernel of the operation that makes ``x``, and an exported file needs nothing of this package.

On a CPU the eager form keeps to what ATen does at the speed of memory. ``sum`` is one such reduction for every layout;
``square().sum()`` is not, since it writes all squares to memory: squares are taken without a temporary, or in one that
stays in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import is_readable, is_traced
from fastgrad.losses import compute_dtype
from fastgrad.ops.dispatch import choose, launcher, register

#: Numbers that stay in one core's second-level cache beside as many that stream through it.
CACHED = 1 << 17
#: Squares that may be added in a row: equal ones round alike, and the errors add up.
LONGEST_RUN = 512
#: Shorter pieces of a channel cost more to start than its squares cost to write to the cache.
SHORTEST_RUN = 64


class ChannelMoments(NamedTuple):
    """Two tensors ``(B, C)``: float64 for float64, else float32."""

    sum: Tensor
    sum_of_squares: Tensor


def canonical(x: Tensor, dim: int) -> Tensor:
    """The view ``(B, C, ...)`` with at least one axis of positions."""
    if dim not in (1, 1 - x.dim()):
        x = x.movedim(dim, 1)
    return x.unsqueeze(2) if x.dim() == 2 else x


def _whole(x: Tensor) -> bool:
    """Whether to reduce the tensor in one piece: for tracers and transforms, off the CPU, and if nothing is in it."""
    differentiated = torch.is_grad_enabled() and x.requires_grad
    return not is_readable(x) or differentiated or x.device.type != "cpu" or x.numel() == 0


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
    """The sum over the positions.

    Inductor adds up to 4096 numbers of a channel one after the other on a CPU, where ATen keeps to a tree. Where they
    are too many, they are in two steps as many as the last axis has positions, and then as many as the others have.
    """
    others = tuple(range(2, x.dim() - 1))
    if others and is_traced() and x.device.type == "cpu" and not _few(x.shape[2:]):
        return x.sum(-1).sum(others)
    return x.sum((*others, -1))


def _few(positions: torch.Size) -> bool:
    """Whether so few positions may be added one after the other; of a symbolic number nobody knows."""
    return all(isinstance(n, int) for n in positions) and math.prod(positions) <= LONGEST_RUN


def _sums(x: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    return _total(_in(dtype, x)) if _whole(x) else _by_samples(x, dtype, _total)


def _squares(x: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    if not _whole(x):
        flat = x.flatten(2)
        run = _run(flat.shape[2])
        if run and flat.stride(2) == 1:
            return _by_samples(flat, dtype, lambda part: _squares_in_runs(part, run))
        if x.numel() > 2 * _cached():
            return _squares_in_blocks(flat, dtype)
    return _total(_in(dtype, x).square())


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


def eager(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Both moments by plain torch."""
    x = canonical(x, dim)
    return _sums(x), _squares(x)


def _kernel(x: Tensor, dim: int) -> Any:
    return launcher("channel_moments", "channel_moments")(canonical(x, dim))


_OPERATOR = register("channel_moments", eager, _kernel)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.dim = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad_sum: Tensor, grad_squares: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    positions = (1,) * (x.dim() - 2)
    first, second = (
        g.reshape(*g.shape, *positions).movedim(1, ctx.dim) for g in (grad_sum, 2 * grad_squares)
    )
    return (first + second * x).to(x.dtype), None


torch.library.register_autograd("fastgrad::channel_moments", _backward, setup_context=_setup)


@torch.library.register_vmap("fastgrad::channel_moments")
def _(
    info: Any, in_dims: tuple[int, None], x: Tensor, dim: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Fold the mapped dimension into the batch: a view if the two are neighbours in memory."""
    x = x.movedim(in_dims[0], 0)
    count, batch = x.shape[:2]
    first, second = _OPERATOR(x.flatten(0, 1), dim)
    return (first.unflatten(0, (count, batch)), second.unflatten(0, (count, batch))), (0, 0)


def _kernel_serves(x: Tensor, dim: int, impl: str) -> bool:
    """Check the arguments; whether the operator runs, rather than plain torch."""
    checks.is_float("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (B, C, ...) or (B, ..., C); its shape was {tuple(x.shape)}")
    if dim == 0 or not -x.dim() < dim < x.dim():
        raise ValueError(
            f"dim must be the dimension of the channels, 1 to {x.dim() - 1} or as far from the end; it was {dim!r}"
        )
    return choose(impl, x) == "triton" and not (impl == "auto" and is_traced())


def channel_moments(x: Tensor, dim: int = 1, *, impl: str = "auto") -> ChannelMoments:
    """Every channel's sum and sum of squares over its positions, for each sample.

    ``sum[b, c] = sum_t x[b, c, t]`` and ``sum_of_squares[b, c] = sum_t x[b, c, t]^2``. Where ``x`` is the gradient at
    the output of a layer, the first is the gradient of the layer's bias.

    Args:
        x: ``(B, C, ...)``, or with ``dim=-1`` ``(B, ..., C)``: the dimensions other than the batch and the channels
            are positions, none of them for ``(B, C)``. Contiguous and channels-last tensors are read where they are.
        dim: Dimension of the channels, any but the batch.
        impl: ``"auto"`` (the Triton kernel on a GPU, plain torch where a graph is traced), ``"triton"`` or ``"eager"``.

    Returns:
        Two tensors ``(B, C)``: float64 for float64, else float32. The same bits in every run on one machine. Zeros
        without positions.

    Raises:
        TypeError: If ``x`` is no floating tensor.
        ValueError: If ``x`` or ``dim`` is not as above, or ``impl="triton"`` cannot serve ``x``.
    """
    if _kernel_serves(x, dim, impl):
        return ChannelMoments(*_OPERATOR(x, dim))
    return ChannelMoments(*eager(x, dim))


def channel_sums(x: Tensor, dim: int = 1, *, impl: str = "auto") -> Tensor:
    """The first of `channel_moments`, ``(B, C)``: plain torch then reads ``x`` once."""
    return _OPERATOR(x, dim)[0] if _kernel_serves(x, dim, impl) else _sums(canonical(x, dim))


def channel_square_sums(x: Tensor, dim: int = 1, *, impl: str = "auto") -> Tensor:
    """The second of `channel_moments`, ``(B, C)``: plain torch then reads ``x`` once."""
    return _OPERATOR(x, dim)[1] if _kernel_serves(x, dim, impl) else _squares(canonical(x, dim))
