"""Rows of few numbers whose inner products estimate those of per-sample gradients, from one backward pass.

A gradient G of a parameter, as a matrix ``(R, C)`` of its dimension 0 and all others, is sketched: number ``(r, c)``
is added to place ``(a[r] + b[c]) mod K`` with sign ``s[r] t[c]``. Two numbers in one place have independent random
signs, so inner products are unbiased; their variance is about ``2 ||g||^2 ||h||^2 / K`` (Pham and Pagh, 2013, tensor
sketches of two vectors; their places are drawn one by one, ours in runs). An outer product's sketch is a circular
convolution of its vectors' sketches, by which products of positions need no gradient. A parameter of at most K numbers
has a place for each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import outside_of_compilation
from fastgrad.batches import bytes_of
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
#: Numbers of a sample for which a call of their own costs less than places for each.
RUN = 512


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
    # Places from K on are those from 0 on.
    rows = torch.zeros(back.samples, 2 * size, dtype=dtype, device=device)
    norms, every = torch.zeros(back.samples, dtype=dtype, device=device), list(range(back.samples))

    def add(key: int, side: ParameterUses) -> None:
        if normalize:
            samples, found = norms_of_uses(side.shape, side.samples, list(side.shares))
            norms.index_add_(0, torch.tensor(samples, device=device), found.to(norms))
        place = Places.of(f"{seed} {names[key]} {side.shape}", side.shape, size, side.shares[0].gradients[0].device)
        for share in side.shares:
            own = share.gradients[0]
            if share.rows == every and own.device == device and compute_dtype(own.dtype) == dtype:
                sketch(rows, share, side.shape, place)
            else:
                found = torch.zeros(len(share.rows), 2 * size, dtype=compute_dtype(own.dtype), device=own.device)
                sketch(found, share, side.shape, place)
                rows.index_add_(0, torch.tensor(share.rows, device=device), found.to(rows))

    back.run(keep, add)
    rows = rows[:, :size] + rows[:, size:]
    return rows / norms.sqrt().masked_fill(norms == 0, 1).unsqueeze(1) if normalize else rows


class Places(NamedTuple):
    """Where the numbers of a parameter ``(R, C)`` go in a row of ``size``: places and signs, ``(R,)`` and ``(C,)``.

    Numbers beside each other have places beside each other, so that they are added without an index: columns in blocks
    of at most K, and ``run`` rows in a run, one every ``pitch`` places, as many as a row of K has room for. Each run
    begins at a random place, with another remainder by ``pitch`` than all others if there are enough: else the numbers
    of two rows would meet column by column, with one sign for all. Any two numbers meet with a probability of at most
    about 1 / K, as with places that are drawn one by one.
    """

    size: int
    run: int
    pitch: int
    #: Where runs and blocks begin.
    runs: list[int]
    blocks: list[int]
    row: Tensor
    row_sign: Tensor
    column: Tensor
    column_sign: Tensor

    @classmethod
    @lru_cache(maxsize=1024)
    def of(cls, key: str, shape: tuple[int, ...], size: int, device: torch.device) -> Places:
        """Draw them from a hash of ``key``."""
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        random = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
        count = shape[0] if shape else 1
        rest = math.prod(shape) // max(1, count)
        run = max(1, size // max(1, rest))
        pitch = size // run
        runs, blocks = -(-count // run), -(-rest // size)
        first = torch.randperm(max(runs, pitch), generator=random, device="cpu")[:runs] % pitch
        first += pitch * torch.randint(run, (runs,), generator=random, device="cpu")
        block = torch.randint(size, (blocks,), generator=random, device="cpu")
        rows, columns = torch.arange(count, device="cpu"), torch.arange(rest, device="cpu")
        places = [first[rows // run] + rows % run * pitch, block[columns // size] + columns % size]
        signs = [
            1 - 2 * torch.randint(2, place.shape, generator=random, dtype=torch.int8, device="cpu") for place in places
        ]
        row, column = (place.remainder_(size).to(device) for place in places)
        row_sign, column_sign = (sign.to(device) for sign in signs)
        return cls(size, run, pitch, first.tolist(), block.tolist(), row, row_sign, column, column_sign)


def digest_of_map(size: int, seed: int) -> str:
    """Return a hash of where numbers go: another version of this package or of PyTorch may draw other places."""
    found, device = hashlib.sha256(), torch.device("cpu")
    for shape in ((5, size + 1), (size + 1, 1)):  # several blocks of columns, several runs of rows
        places = Places.of(f"{seed} {shape}", shape, size, device)
        for drawn in (places.row, places.row_sign, places.column, places.column_sign):
            found.update(bytes_of(drawn))
    return found.hexdigest()


def sketch(rows: Tensor, share: Share, shape: Sequence[int], places: Places) -> None:
    """Add a share of a parameter of this shape to rows ``(b, 2 K)``."""
    with full_precision(share.gradients[0].device):
        positions = share.positions()
        if isinstance(share.formula, Table):
            _of_table(rows, *share.factors(), places)
        elif positions and _transforms(shape, positions, places.size):
            rows[:, : places.size] += _of_products(*share.factors(), places)
        else:
            _of_gradients(rows, share, shape, places)


def _transforms(shape: Sequence[int], positions: int, size: int) -> bool:
    """Return whether sketches of so many products cost less than a gradient; a pure function of sizes."""
    numbers, first = math.prod(shape), shape[0]
    spectrum = 5 * size * math.log2(size + 1) + 3 * size
    products = positions * (spectrum / TRANSFORM + (first + numbers // first) / ADD)
    return products < positions * numbers / PRODUCT + 2 * numbers / ADD


def _of_table(rows: Tensor, index: Tensor, gradients: Tensor, places: Places) -> None:
    """Add sums over positions of rows ``index`` ``(b, T)`` with gradients ``(b, T, C)``."""
    at = places.row[index].unsqueeze(2) + places.column
    value = gradients * places.row_sign[index].unsqueeze(2) * places.column_sign
    rows.scatter_add_(1, at.flatten(1), value.flatten(1))


def _of_products(left: Tensor, right: Tensor, places: Places) -> Tensor:
    """Sketch ``sum_t left_t right_t^T`` from ``(b, T, R)`` and ``(b, T, C)``, by the spectra of both sketches."""
    size, held = places.size, max(1, CHUNK_BYTES // (16 * places.size))  # positions at a time
    sides, found = ((places.row, places.row_sign), (places.column, places.column_sign)), []
    for pair in zip(*(side.split(max(1, held // max(1, side.shape[1]))) for side in (left, right)), strict=True):
        total = pair[0].new_zeros(len(pair[0]), size // 2 + 1, dtype=torch.promote_types(left.dtype, torch.complex64))
        for several in zip(*(side.split(held, 1) for side in pair), strict=True):
            spectra = []
            for value, (at, sign) in zip(several, sides, strict=True):
                sketch = value.new_zeros(*value.shape[:2], size)
                spectra.append(torch.fft.rfft(sketch.scatter_add_(2, at.expand_as(value), value * sign)))
            total += (spectra[0] * spectra[1]).sum(1)
        found.append(torch.fft.irfft(total, n=size))
    return torch.cat(found)


def _of_gradients(rows: Tensor, share: Share, shape: Sequence[int], places: Places) -> None:
    """Add gradients that are formed, a part of the parameter at a time."""
    samples, run = len(rows), min(places.run, len(places.row)) * min(places.size, len(places.column))
    add = _added if rows.device.type == "cpu" and run >= RUN else _scattered
    sign = places.row_sign.to(rows.dtype).unsqueeze(1) * places.column_sign
    of_row = len(places.column) // shape[1] if len(shape) > 2 else 1  # columns for each place of dimension 1
    for part in ParameterUses(shape, samples, [share]).parts(samples):
        (value,) = upcast(share.part(part))
        value = value.reshape(samples, -1, len(places.column)) if len(shape) < 3 else value.flatten(2)
        first, _, _ = part.indices(max(shape, default=1))
        at = (0, first * of_row) if len(shape) > 2 else (first, 0)
        add(rows, value, sign, places, *at)


def _added(rows: Tensor, value: Tensor, sign: Tensor, places: Places, row: int, column: int) -> None:
    """Add a part ``(b, r, c)`` of gradients from a row and a column on, run by run."""
    tops = list(_cuts(row, row + value.shape[1], places.run))
    counts = [bottom - top for top, bottom in tops]
    sign = sign[row : row + value.shape[1], column : column + value.shape[2]]
    for left, right in _cuts(column, column + value.shape[2], places.size):
        block, part = places.blocks[left // places.size] + left % places.size, slice(left - column, right - column)
        pairs = zip(value[..., part].split(counts, 1), sign[:, part].split(counts), strict=True)
        for (top, _), (own, signs) in zip(tops, pairs, strict=True):
            at = places.runs[top // places.run] + top % places.run * places.pitch + block
            to = rows.as_strided(own.shape, (rows.stride(0), places.pitch, 1), at % places.size)
            to.addcmul_(own, signs)


def _cuts(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range between multiples of ``step``."""
    while first < last:
        end = min(last, (first // step + 1) * step)
        yield first, end
        first = end


def _scattered(rows: Tensor, value: Tensor, sign: Tensor, places: Places, row: int, column: int) -> None:
    """Do the same in one call, number by number."""
    where = slice(row, row + value.shape[1]), slice(column, column + value.shape[2])
    at = (places.row[where[0]].unsqueeze(1) + places.column[where[1]]).flatten()
    rows.scatter_add_(1, at.expand(len(value), -1), (value * sign[where]).flatten(1))
