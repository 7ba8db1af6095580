"""Inner products of samples' gradients of one parameter, and sums of their squares and absolute values.

A gradient is a sum over uses of the parameter. The term of one use is ``sum_t l_t r_t^T`` over its positions, or only
known as a whole. There are two ways: products of positions, ``<G_i, G_j> = sum_{t,t'} (l_it . l_jt') (r_it . r_jt')``,
and gradients of all samples, formed for as much of the parameter as fits a chunk. `seconds` predicts the cheaper one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from fastgrad.engine.backward import Share
from fastgrad.layers.formula import upcast
from fastgrad.layers.linear import STRAIGHT, Product, Table
from fastgrad.ops.conv.cost import ADD, CALL, PRODUCT

#: Bytes of gradients, or of products of positions, held at once. The C library reuses blocks below 32 MiB.
CHUNK_BYTES = 24 * 2**20

Shares = Sequence[Share]


class ParameterUses:
    """All uses of a parameter of this ``shape`` in the gradients of ``samples`` samples."""

    def __init__(self, shape: Sequence[int], samples: int, shares: Shares) -> None:
        self.shape, self.samples, self.shares = tuple(shape), samples, joined(shares)
        #: The rows of a table that are used, if only these are kept.
        self.kept: Tensor | None = None

    def part(self, at: slice) -> Tensor:
        """Return gradients ``(B, ...)`` of a part, as `fastgrad.layers.formula.Formula.part`."""
        found = [(share.rows, upcast(share.part(at))[0]) for share in self.shares]
        if len(found) == 1 and len(found[0][0]) == self.samples:
            return found[0][1]
        total = found[0][1].new_zeros(self.samples, *found[0][1].shape[1:])
        for rows, own in found:
            total.index_add_(0, torch.tensor(rows, device=total.device), own)
        return total

    def parts(self, samples: int) -> Iterator[slice]:
        """Yield parts of the parameter whose gradients, for so many samples, fit a chunk."""
        dim = 0 if len(self.shape) < 3 else 1
        size = self.shape[dim] if self.shape else 1
        each = 4 * samples * math.prod(self.shape[:dim] + self.shape[dim + 1 :])
        step = max(1, CHUNK_BYTES // max(1, each))
        if step >= size:
            yield slice(None)
            return
        for first in range(0, size, step):
            yield slice(first, min(first + step, size))


def joined(shares: Shares) -> list[Share]:
    """Join the calls of one linear function, for example over time, into one with many positions."""
    several: dict[tuple[int, ...], list[Share]] = {}
    others: list[Share] = []
    for share in shares:
        straight = isinstance(share.formula, Product) and not share.slot
        (several.setdefault(tuple(share.rows), []) if straight else others).append(share)
    for rows, same in several.items():
        if len(same) == 1:
            others += same
        else:
            left, right = (torch.cat(each, 1) for each in zip(*(share.factors() for share in same), strict=True))
            others.append(Share(list(rows), STRAIGHT, 0, [right], [left]))
    return others


def _compacted(*sides: ParameterUses) -> None:
    """Reduce a parameter that is only used as a table to the rows that are used."""
    if not all(isinstance(share.formula, Table) for side in sides for share in side.shares):
        return
    pairs = [share.factors() for side in sides for share in side.shares]
    used, places = torch.unique(torch.cat([index.flatten() for index, _ in pairs]), return_inverse=True)
    own = iter(zip(places.split([index.numel() for index, _ in pairs]), pairs, strict=True))
    table = Table(len(used), None)
    for side in sides:
        given = [(share.rows, *next(own)) for share in side.shares]
        side.shares = [Share(rows, table, 0, [at.view_as(i)], [g]) for rows, at, (i, g) in given]
        side.shape, side.kept = (len(used), *side.shape[1:]), used


def seconds(
    shape: Sequence[int], samples: tuple[int, int], positions: tuple[Sequence[int], Sequence[int]]
) -> tuple[float, float]:
    """Return the predicted times of products of positions and of gradients that are formed.

    Pure function of the parameter's shape and, for both sides, the samples and the positions of each use.
    """
    first, size = shape[0], torch.Size(shape).numel()
    (b, c), (many, more) = samples, (sum(each) for each in positions)
    pairs = b * many * c * more
    each = pairs * (2 * (first + size // first) / PRODUCT + 4 / ADD)
    formed = (b * many + c * more) * size / PRODUCT + (b + c) * size * 3 / ADD + b * c * size / PRODUCT
    return each + 20 * CALL * len(positions[0]) * len(positions[1]), formed + 10 * CALL


def gram(side: ParameterUses, other: ParameterUses | None = None) -> Tensor:
    """Return inner products ``(B, B')`` of the gradients of two sides, or of one with itself, in float64."""
    first, second = side, other or side
    _compacted(first, *([other] if other else []))
    device = first.shares[0].gradients[0].device
    result = torch.zeros(first.samples, second.samples, dtype=torch.float64, device=device)
    positions = [[share.positions() for share in each.shares] for each in (first, second)]
    if all((*positions[0], *positions[1])):
        of_pairs, formed = seconds(first.shape, (first.samples, second.samples), (positions[0], positions[1]))
        if of_pairs < formed:
            ours, theirs = ([(s.rows, s.factors()) for s in each.shares] for each in (first, second))
            for (n, (rows, factors)), (m, (columns, others)) in product(enumerate(ours), enumerate(theirs)):
                if other or m >= n:
                    found = pairs(factors, others)
                    places = torch.tensor(rows, device=device)[:, None], torch.tensor(columns, device=device)
                    result.index_put_(places, found, accumulate=True)
                    if not other and m > n:
                        result.mT.index_put_(places, found, accumulate=True)
            return result
    for at in first.parts(first.samples + (second.samples if other else 0)):
        own = _rows(first.part(at))
        result += own @ (_rows(second.part(at)) if other else own).mT
    return result


def _rows(gradients: Tensor) -> Tensor:
    return gradients.reshape(gradients.shape[0], -1)


def pairs(factors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return ``(b, b')`` sums over all pairs of positions, in float64, from factors ``(b, T, .)`` and ``(b', T', .)``.

    With several positions the terms may cancel, so they are computed in float64 as well.
    """
    (left, right), (b, t), (c, u) = factors, factors[1].shape[:2], others[1].shape[:2]
    dtype = right.dtype if t == u == 1 else torch.float64
    step = max(1, CHUNK_BYTES // (16 * max(1, t * c * u)))
    found = []
    for i in range(0, b, step):
        each = _products(left[i : i + step], others[0], dtype).double()
        each *= _products(right[i : i + step], others[1], dtype)
        found.append(each.view(-1, t, c, u).sum((1, 3)))
    return torch.cat(found)


def _products(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return inner products of all rows ``(b T, b' T')``; integers are the rows of a unit matrix."""
    if x.dim() == 2 and y.dim() == 2:
        return (x.reshape(-1, 1) == y.reshape(-1)).to(dtype)
    if x.dim() == 2:
        return y.flatten(0, 1)[:, x.flatten()].mT.to(dtype)
    x = x.flatten(0, 1).to(dtype)
    return x[:, y.flatten()] if y.dim() == 2 else x @ y.flatten(0, 1).mT.to(dtype)


def _squared(gradients: Tensor) -> Tensor:
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:  # without writing squares
        total.addcmul_(gradient, gradient)
    return total


def square_sum(side: ParameterUses) -> Tensor:
    """Return the sum over samples of squared gradients, of the parameter's shape."""
    shape = side.shape
    _compacted(side)
    if [share.positions() for share in side.shares] == [1]:
        left, right = (factor.squeeze(1) for factor in side.shares[0].factors())
        square = right.square()
        found = square.new_zeros(side.shape[0], square.shape[1])
        found = found.index_add_(0, left, square) if left.dim() == 1 else left.square().mT @ square
        found = found.view(side.shape)
    else:
        parts = [_squared(side.part(at)) for at in side.parts(side.samples)]
        found = parts[0] if len(parts) == 1 else torch.cat(parts, 0 if len(shape) < 3 else 1)
    return found if side.kept is None else found.new_zeros(shape).index_copy_(0, side.kept, found)


def abs_sum(side: ParameterUses) -> Tensor:
    """Return the L1 norm ``(B,)`` of each sample's gradient."""
    _compacted(side)
    if [share.positions() for share in side.shares] == [1] and len(side.shares[0].rows) == side.samples:
        left, right = (factor.squeeze(1) for factor in side.shares[0].factors())
        norms = right.abs().sum(1)
        return norms if left.dim() == 1 else norms * left.abs().sum(1)
    return torch.stack([_rows(side.part(at)).abs().sum(1) for at in side.parts(side.samples)]).sum(0)
