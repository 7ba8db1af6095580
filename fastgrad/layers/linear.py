"""Products with a matrix, at any number of positions, and rows of an embedding table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.layers.call import Call, Refused, mixes_samples
from fastgrad.layers.formula import Formula, Tensors, positions_first, sqnorm, upcast
from fastgrad.ops.conv.sqnorm import linear_sqnorm
from fastgrad.ops.dispatch import implementation

Factors = tuple[Tensor, Tensor]


def weight_sqnorm(a: Tensor, g: Tensor) -> Tensor:
    """Return squared norms ``(B,)`` of weight gradients ``sum_t g_t a_t^T`` from ``(B, T, C)`` and ``(B, T, O)``."""
    if a.shape[1] == 1:
        a, g = upcast(a, g)
        return sqnorm(a) * sqnorm(g)
    return linear_sqnorm(a, g, impl=implementation.get())


def bias_sqnorm(g: Tensor) -> Tensor:
    """Return squared norms of bias gradients, the sum of ``g`` over positions: ``(B, T, O) -> (B,)``."""
    (g,) = upcast(g)
    return sqnorm(g[:, 0] if g.shape[1] == 1 else g.sum(1))


def row_sqnorm(index: Tensor, g: Tensor) -> Tensor:
    """Return squared norms ``(B,)`` of a table's gradients, from indices ``(B, T)`` and gradients ``(B, T, C)``.

    Positions with the same index add up before the norm is taken: position t adds ``||s_t||^2 / c_t``, where ``s_t``
    sums ``g`` over the c_t positions with its index. Unlike a sum over pairs, this has no negative terms, so nothing
    cancels.
    """
    if g.shape[1] == 1:
        return sqnorm(g[:, 0])
    same = (index.unsqueeze(1) == index.unsqueeze(2)).to(g.dtype)
    return (torch.bmm(same, g).square().sum(2) / same.sum(2)).sum(1)


class Product(Formula):
    """``y_t = W x_t + b``, whose weight is ``(O, C)``, or ``(C, O)`` if ``turned``."""

    name = "linear"

    def __init__(self, turned: bool) -> None:
        self._turned = turned

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        a, g = positions_first(saved[0], 1), positions_first(gradients[0], 1)
        return [bias_sqnorm(g) if slot else weight_sqnorm(a, g) for slot in slots]

    def part(self, saved: Tensors, gradients: Tensors, slot: int, at: slice) -> Tensor:
        if slot:
            return positions_first(upcast(gradients[0])[0], 1).sum(1)[:, at]
        left, right = self.factors(saved, gradients, slot)
        return left[..., at].mT @ right

    def positions(self, saved: Tensors, gradients: Tensors, slot: int) -> int:
        return 0 if slot else math.prod(gradients[0].shape[1:-1])

    def factors(self, saved: Tensors, gradients: Tensors, slot: int) -> Factors:
        a, g = (positions_first(x, 1) for x in upcast(saved[0], gradients[0]))
        return (a, g) if self._turned else (g, a)


class Table(Formula):
    """Rows of a table ``(V, C)`` by index; the row ``padding`` has no gradient."""

    name = "embedding"

    def __init__(self, rows: int, padding: int | None) -> None:
        self._rows, self._padding = rows, padding

    def rows(self, saved: Tensors, gradients: Tensors) -> Factors:
        """Return indices ``(B, T)`` and the gradients ``(B, T, C)`` of their rows."""
        (g,) = upcast(positions_first(gradients[0], 1))
        index = saved[0].reshape(g.shape[0], g.shape[1])
        if self._padding is not None:
            g = g * (index != self._padding).unsqueeze(-1)
        return index, g

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        return [row_sqnorm(*self.rows(saved, gradients))]

    def part(self, saved: Tensors, gradients: Tensors, slot: int, at: slice) -> Tensor:
        index, g = self.rows(saved, gradients)
        first, last, _ = at.indices(self._rows)
        inside = (index >= first) & (index < last)
        table = g.new_zeros(len(g), last - first, g.shape[2])
        places = torch.where(inside, index - first, 0).unsqueeze(2).expand_as(g)
        return torch.scatter_add(table, 1, places, g * inside.unsqueeze(2))

    def positions(self, saved: Tensors, gradients: Tensors, slot: int) -> int:
        return math.prod(gradients[0].shape[1:-1])

    def factors(self, saved: Tensors, gradients: Tensors, slot: int) -> Factors:
        return self.rows(saved, gradients)


STRAIGHT, TURNED = Product(turned=False), Product(turned=True)


def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Rule for ``torch.nn.functional.linear``."""
    if not call.owns(weight) or weight.dim() != 2 or not call.serves(bias) or call.owns(input):
        return NotImplemented
    return call.apply(lambda x: F.linear(x, weight, bias), input, [weight, bias], STRAIGHT)


def mm(call: Call, input: Tensor, mat2: Tensor, **options: Any) -> Any:
    """Rule for ``torch.mm``."""
    return NotImplemented if options else matmul(call, input, mat2)


def matmul(call: Call, input: Tensor, other: Tensor, **options: Any) -> Any:
    """Rule for ``torch.matmul`` with a parameter on the right."""
    if options:  # such as out
        return NotImplemented
    if not call.owns(other) or other.dim() != 2 or call.owns(input) or input.dim() < 1:
        return NotImplemented
    return call.apply(lambda x: x @ other, input, [other], TURNED)


def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """Rule for ``torch.addmm`` with a bias ``(O,)`` and a weight ``(C, O)``."""
    if beta != 1 or alpha != 1 or not call.owns(mat2) or not call.owns(input) or input.dim() != 1 or call.owns(mat1):
        return NotImplemented
    return call.apply(lambda x: x @ mat2 + input, mat1, [mat2, input], TURNED)


def embedding(
    call: Call, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.embedding``."""
    if scale_grad_by_freq:
        raise mixes_samples("an embedding divides gradients by counts over the batch (scale_grad_by_freq=True)")
    if not call.owns(weight):
        return NotImplemented
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    table = Table(weight.shape[0], padding)

    def rows(index: Tensor) -> Tensor:
        # With a largest norm this shortens the model's own rows, as in an ordinary call.
        return F.embedding(index, weight, padding_idx, max_norm, norm_type, sparse=sparse)

    return call.apply(rows, input, [weight], table)


def embedding_bag(call: Call, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Refuse ``torch.nn.functional.embedding_bag`` with sparse gradients, which copies cannot have."""
    if kwargs.get("sparse") or args[5:6] == (True,):
        raise Refused("its bag of embeddings has sparse gradients (sparse=True)")
    return NotImplemented


def sum_sqnorm(products: Sequence[Factors], rows: Sequence[Factors]) -> Tensor:
    """Return squared norms ``(B,)`` of the sums of gradients of one matrix ``(V, C)``.

    ``products`` are inputs ``(B, T, C)`` and output gradients ``(B, T, V)`` of linear functions; ``rows`` are indices
    ``(B, T)`` and gradients ``(B, T, C)`` of a table's rows. The sum over functions is one over all positions, so no
    gradient is formed: a row at t and a product at s meet in ``d[s, index[t]] (a[s] . g[t])``.
    """
    norms = []
    if products:
        a, d = (torch.cat(each, 1) for each in zip(*products, strict=True))
        norms.append(weight_sqnorm(a, d))
    if rows:
        index, g = (torch.cat(each, 1) for each in zip(*rows, strict=True))
        norms.append(row_sqnorm(index, g))
    if len(norms) == 2:
        at = d.gather(2, index.unsqueeze(1).expand(-1, d.shape[1], -1))
        norms.append(2 * (at.double() * (a @ g.mT)).sum((1, 2)).to(g.dtype))
    return torch.stack(norms).sum(0)
