"""Rows of few numbers whose inner products estimate those of per-sample gradients, from one backward pass.

A gradient G of a parameter, as a matrix ``(R, C)`` of its dimension 0 and all others, is sketched: number ``(r, c)``
is added to place ``(a[r] + b[c]) mod K`` with sign ``s[r] t[c]``. Two numbers in one place have independent random
signs, so inner products are unbiased; their variance is about ``2 ||g||^2 ||h||^2 / K`` (Pham and Pagh, 2013, tensor
sketches of two vectors). An outer product's sketch is a circular convolution of its vectors' sketches, by which
products of positions need no gradient. A parameter of at most K numbers has a place for each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import outside_of_compilation
from fastgrad.engine.backward import Share
from fastgrad.engine.norms import norms_of_uses
from fastgrad.engine.products import CHUNK_BYTES, ParameterUses
from fastgrad.engine.sharded import names_of, whole
from fastgrad.gradients.recorder import Params, active, parameters_given, parameters_of, record
from fastgrad.gradients.uses import UsesPass, calls_of_one_size
from fastgrad.layers.formula import upcast
from fastgrad.layers.linear import Table
from fastgrad.losses import compute_dtype
from fastgrad.ops.conv.cost import ADD, PRODUCT
from fastgrad.ops.dispatch import full_precision

#: Multiply-adds per second of transforms of a few thousand numbers, beside `PRODUCT`.
TRANSFORM = PRODUCT / 5


def grad_project(
    losses: Tensor | Sequence[Tensor], params: Params, size: int, *, seed: int = 0, normalize: bool = False,
    retain_graph: bool | None = None,
) -> Tensor:  # fmt: skip
    """Return a row of K numbers for each sample, whose inner products are unbiased estimates of `grad_gram`'s.

    A row is a fixed linear map of the sample's gradient, so rows of different batches, calls and processes go together.
    The map depends on ``seed``, ``size``, and each parameter's name in the recorded model and shape alone; the row of
    several parameters is the sum of theirs. Over seeds, the standard deviation of ``<row_i, row_j>`` is at most about
    ``||g_i|| ||g_j|| sqrt(2 / K)``, whatever the number of parameters. A parameter of at most K numbers adds nothing to
    it by itself.

    Args:
        losses: As in `grad_sqnorm`.
        params: As in `grad_sqnorm`.
        size: K, the length of a row.
        seed: Chooses the map.
        normalize: Whether to divide each row by the exact norm of the sample's gradient, so that inner products
            estimate cosines. A gradient of zeros has a row of zeros.
        retain_graph: Whether to keep the graph for another call.

    Returns:
        ``(B, K)``, float32 (float64 for a float64 model). Errors are roundings relative to ``||g_i||``. Parameters that
        the losses do not depend on add zeros.

    Raises:
        RuntimeError: As `grad_sqnorm`.
        ValueError: As `grad_gram`, and for a ``size`` below 1 or a ``seed`` that NumPy refuses.
        TypeError: For a ``normalize`` that is no bool.

    Example::

        with fastgrad.record(model):
            losses = F.cross_entropy(model(x), y, reduction="none")
            rows = fastgrad.grad_project(losses, model, 4096)
        estimates = rows @ rows.mT
    """
    recording = active("grad_project")
    first, wanted = checks.tensors("losses", losses), parameters_given(params)
    checks.at_least(1, size=size)
    checks.is_seed(seed)
    checks.is_bool(normalize=normalize)
    wanted = whole(recording.model, wanted)
    return outside_of_compilation(_rows)(recording, first, wanted, size, seed, normalize, bool(retain_graph))


def _rows(
    recording: record, outputs: Sequence[Tensor], wanted: Sequence[Tensor], size: int, seed: int, normalize: bool,
    keep: bool,
) -> Tensor:  # fmt: skip
    asked = parameters_of(recording, wanted)
    names = names_of(recording.model)
    back = UsesPass(calls_of_one_size(recording, outputs, "losses"), asked, outputs)
    dtype = compute_dtype(*(p.dtype for p in wanted), *(() if wanted else (torch.float32,)))
    device = wanted[0].device if wanted else outputs[0].device
    rows = torch.zeros(back.samples, size, dtype=dtype, device=device)
    norms = torch.zeros(back.samples, dtype=dtype, device=device)

    def add(key: int, side: ParameterUses) -> None:
        if normalize:
            samples, found = norms_of_uses(side.shape, side.samples, list(side.shares))
            norms.index_add_(0, torch.tensor(samples, device=device), found.to(norms))
        place = Places.of(f"{seed} {names[key]} {side.shape}", side.shape, size, side.shares[0].gradients[0].device)
        for share in side.shares:
            rows.index_add_(0, torch.tensor(share.rows, device=device), sketched(share, side.shape, place).to(rows))

    back.run(keep, add)
    return rows / norms.sqrt().masked_fill(norms == 0, 1).unsqueeze(1) if normalize else rows


class Places(NamedTuple):
    """Where the numbers of a parameter ``(R, C)`` go in a row of ``size``: places and signs, ``(R,)`` and ``(C,)``."""

    size: int
    row: Tensor
    row_sign: Tensor
    column: Tensor
    column_sign: Tensor

    @classmethod
    def of(cls, key: str, shape: Sequence[int], size: int, device: torch.device) -> Places:
        """Draw them from a hash of ``key``."""
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        random = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
        count = shape[0] if shape else 1
        numbers = math.prod(shape)
        if numbers <= size:
            # As many places as numbers, wherever they begin.
            rest = numbers // max(1, count)
            first = int(torch.randint(size, (), generator=random, device="cpu"))
            places = [(torch.arange(count, device="cpu") * rest + first) % size, torch.arange(rest, device="cpu")]
        else:
            both = (count, numbers // count)
            places = [torch.randperm(max(n, size), generator=random, device="cpu")[:n] % size for n in both]
        signs = [
            1 - 2 * torch.randint(2, place.shape, generator=random, dtype=torch.int8, device="cpu") for place in places
        ]
        row, column = (place.to(device) for place in places)
        row_sign, column_sign = (sign.to(device) for sign in signs)
        return cls(size, row, row_sign, column, column_sign)

    def sides(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return places and signs of rows, and those of columns."""
        return (self.row, self.row_sign), (self.column, self.column_sign)


def sketched(share: Share, shape: Sequence[int], places: Places) -> Tensor:
    """Return the rows ``(b, K)`` of a share of a parameter of this shape."""
    with full_precision(share.gradients[0].device):
        positions = share.positions()
        if isinstance(share.formula, Table):
            return _of_table(*share.factors(), places)
        if positions and _transforms(shape, positions, places.size):
            return _of_products(*share.factors(), places)
        return _of_gradients(share, shape, places)


def _transforms(shape: Sequence[int], positions: int, size: int) -> bool:
    """Return whether sketches of so many products cost less than a gradient; a pure function of sizes."""
    numbers, first = math.prod(shape), shape[0]
    spectrum = 5 * size * math.log2(size + 1) + 3 * size
    products = positions * (spectrum / TRANSFORM + (first + numbers // first) / ADD)
    return products < positions * numbers / PRODUCT + 3 * numbers / ADD


def _of_table(index: Tensor, gradients: Tensor, places: Places) -> Tensor:
    """Sketch sums over positions of rows ``index`` ``(b, T)`` with gradients ``(b, T, C)``."""
    at = (places.row[index].unsqueeze(2) + places.column) % places.size
    value = gradients * places.row_sign[index].unsqueeze(2) * places.column_sign
    return value.new_zeros(len(value), places.size).scatter_add_(1, at.flatten(1), value.flatten(1))


def _of_products(left: Tensor, right: Tensor, places: Places) -> Tensor:
    """Sketch ``sum_t left_t right_t^T`` from ``(b, T, R)`` and ``(b, T, C)``, by the spectra of both sketches."""
    size, held = places.size, max(1, CHUNK_BYTES // (16 * places.size))  # positions at a time
    found = []
    for pair in zip(*(side.split(max(1, held // max(1, side.shape[1]))) for side in (left, right)), strict=True):
        total = pair[0].new_zeros(len(pair[0]), size // 2 + 1, dtype=torch.promote_types(left.dtype, torch.complex64))
        for several in zip(*(side.split(held, 1) for side in pair), strict=True):
            spectra = []
            for value, (at, sign) in zip(several, places.sides(), strict=True):
                sketch = value.new_zeros(*value.shape[:2], size)
                spectra.append(torch.fft.rfft(sketch.scatter_add_(2, at.expand_as(value), value * sign)))
            total += (spectra[0] * spectra[1]).sum(1)
        found.append(torch.fft.irfft(total, n=size))
    return torch.cat(found)


def _of_gradients(share: Share, shape: Sequence[int], places: Places) -> Tensor:
    """Sketch gradients that are formed, a part of the parameter at a time."""
    samples = len(share.rows)
    at = ((places.row.unsqueeze(1) + places.column) % places.size).view(shape)
    sign = (places.row_sign.unsqueeze(1) * places.column_sign).view(shape)
    rows = share.gradients[0].new_zeros(samples, places.size, dtype=compute_dtype(share.gradients[0].dtype))
    for part in ParameterUses(shape, samples, [share]).parts(samples):
        where = (slice(None), part) if len(shape) > 2 else (part,) if shape else ()
        (value,) = upcast(share.part(part))
        value = value.reshape(samples, -1) * sign[where].reshape(-1)
        rows.scatter_add_(1, at[where].reshape(-1).expand_as(value), value)
    return rows
