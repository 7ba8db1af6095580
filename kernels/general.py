"""Rows of any length and loss, plain or in log space: all contrasts, one label's norm, or statistics.

- ``rows_kernel``: a program owns whole rows, which stay on chip; the logits are read once.
- ``moments_kernel`` then ``finish_kernel``: programs share a row, a tile of logits each, and read it twice.

``KIND`` names what is written, float32: ``contrasts`` ``(B, N)``; for one label a row ``(B, K)``, ``predicted``,
``indices`` (K class indices), ``ones`` and ``uniform`` (y = 1 and y = 1/N for every class); or ``statistics``
``(B, 5)``: minimum, maximum, mean, softmax expectation and predicted class. An index outside ``[0, N)`` gives NaN.
"""

import triton
import triton.language as tl

from .contrast import features_factor, load_rows, multiple, square_sum
from .losses import Moments, broadcast, merged, moments, terms, value
from .target import constant_brier, constant_sums, statistics


@triton.jit
def scaled(v, factor, LOG: tl.constexpr):
    """Return squared norms of gradients from those of delta, or their logarithms."""
    return v + tl.log(factor) if LOG else v * factor


@triton.jit
def store_labels(
    z_ptr, y_ptr, out_ptr, rows, valid, N, K, stride_zb, stride_zn, stride_yb, stride_yk, t, factor,
    LOSS: tl.constexpr, KIND: tl.constexpr, LOG: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write the norms ``(B, K)`` of a row's labels: the predicted class, K class indices, or brier's constant label."""
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = valid[:, None] & (k < K)
    if KIND == "indices":
        y = tl.load(y_ptr + rows[:, None] * stride_yb + k.to(tl.int64) * stride_yk, mask=inside, other=0).to(tl.int64)
        known = (y >= 0) & (y < N)
        at = rows[:, None] * stride_zb + tl.where(known, y, 0) * stride_zn
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.where(known, value(z, broadcast(t), LOSS, LOG), float("nan"))
    elif KIND == "predicted":
        v = t.predicted[:, None]
    else:
        v = constant_brier(t, LOG)[:, None]
    tl.store(out_ptr + rows[:, None] * K + k, scaled(v, factor[:, None], LOG), mask=inside)


@triton.jit(do_not_specialize=["B", "N"])
def rows_kernel(
    h_ptr, z_ptr, y_ptr, out_ptr, B, N, D, K, stride_hb, stride_hd, stride_zb, stride_zn, stride_yb, stride_yk,
    LOSS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN_H: tl.constexpr, ALIGN_Z: tl.constexpr,
):  # fmt: skip
    """Grid ``(cdiv(B, ROWS),)``: rows of up to ``BLOCK_N`` logits."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < B
    z, inside = load_rows(z_ptr, rows, valid, N, stride_zb, stride_zn, BLOCK_N, ALIGN_Z, float("-inf"))
    square = square_sum(h_ptr, rows, valid, 0, D, stride_hb, stride_hd, BLOCK_D, ALIGN_H)
    factor = features_factor(square, N, BIAS, MEAN)
    m = moments(z, inside, LOSS, LOG)
    t = terms(m, LOSS, LOG)
    if KIND == "contrasts":
        at = (rows * multiple(N, ALIGN_Z))[:, None] + tl.arange(0, BLOCK_N)[None, :]
        tl.store(out_ptr + at, scaled(value(z, broadcast(t), LOSS, LOG), factor[:, None], LOG), mask=inside)
    elif KIND == "statistics":
        low, high, total, weighted, weight = statistics(z, inside, broadcast(t), LOSS)
        found = (low, high, total / N, weighted / weight, t.predicted)
        for i in tl.static_range(5):
            tl.store(out_ptr + rows * 5 + i, found[i] * factor, mask=valid)
    elif ((KIND == "ones") or (KIND == "uniform")) and (LOSS != "brier"):
        _, v = constant_sums(z, inside, m, N, LOSS, KIND, LOG, True)
        if LOG and not ((LOSS == "bce") and (KIND == "ones")):
            v = tl.log(v)
        tl.store(out_ptr + rows, scaled(v, factor, LOG), mask=valid)
    else:
        store_labels(
            z_ptr, y_ptr, out_ptr, rows, valid, N, K, stride_zb, stride_zn, stride_yb, stride_yk, t, factor,
            LOSS, KIND, LOG, BLOCK_K,
        )  # fmt: skip


@triton.jit
def span(
    row, tile, N, stride_b, stride_n, BLOCK: tl.constexpr, ALIGN: tl.constexpr, PEEL: tl.constexpr
):  # fmt: skip
    """Return the offsets of a row's tile, its columns, of which some may lie outside the row, and whether none does.

    With ``PEEL`` rows are contiguous and begin anywhere. A tile begins at a multiple of 16 elements, the first one
    before its row, so that accesses of whole tiles are wide.
    """
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    first = tile * BLOCK
    if PEEL:
        at = row * N // 16 * 16 + cols
        before = (row * N % 16).to(tl.int32)
        return at[None, :], (cols - before)[None, :], (first >= before) & (first + BLOCK - before <= N)
    at = row * multiple(stride_b, ALIGN) + cols.to(tl.int64) * stride_n
    return at[None, :], cols[None, :], False


@triton.jit
def load_tile(ptr, at, inside, whole, PEEL: tl.constexpr, other: tl.constexpr):
    """Return a tile of logits in float32; a whole one is not masked."""
    if PEEL:
        if whole:  # noqa: SIM108 - the condition is not one of Python's
            z = tl.load(ptr + at)
        else:
            z = tl.load(ptr + at, mask=inside, other=other)
    else:
        z = tl.load(ptr + at, mask=inside, other=other)
    return z.to(tl.float32)


@triton.jit(do_not_specialize=["N", "tiles"])
def moments_kernel(
    h_ptr, z_ptr, work_ptr, N, D, stride_hb, stride_hd, stride_zb, stride_zn, tiles, chunk_d,
    LOSS: tl.constexpr, LOG: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr, ALIGN_Z: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Grid ``(B * tiles,)``: moments of a tile of a row and the squares of ``chunk_d`` features.

    ``work`` is float32 ``(1 + COUNT, B, tiles)``; the moments' first ``COUNT`` fields are written.
    """
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    n = multiple(N, ALIGN_Z)
    at, cols, whole = span(row, tile, n, stride_zb, stride_zn, BLOCK_N, ALIGN_Z, PEEL)
    inside = (cols >= 0) & (cols < n)
    z = load_tile(z_ptr, at, inside, whole, PEEL, float("-inf"))
    start = tile * chunk_d
    rows = row + tl.arange(0, 1)
    valid = rows >= 0
    square = square_sum(
        h_ptr, rows, valid, start, tl.minimum(D, start + chunk_d), stride_hb, stride_hd, BLOCK_D, ALIGN_H
    )  # fmt: skip
    m = moments(z, inside, LOSS, LOG)
    plane = tl.num_programs(0).to(tl.int64)
    part = work_ptr + rows * tiles + tile
    tl.store(part, square)
    for i in tl.static_range(COUNT):
        tl.store(part + (i + 1) * plane, m[i])


@triton.jit
def merge_parts(
    work_ptr, row, tiles, plane, LOSS: tl.constexpr, LOG: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Return a row's moments and sum of squares from what ``moments_kernel`` wrote for at most ``PARTS`` tiles."""
    part = tl.arange(0, PARTS)[None, :]
    exists = part < tiles
    at = work_ptr + row * tiles + part
    square = tl.sum(tl.load(at, mask=exists, other=0.0), 1)
    top = tl.load(at + plane, mask=exists, other=float("-inf"))
    second = tl.load(at + 2 * plane, mask=exists, other=float("-inf"))
    s1 = tl.load(at + 3 * plane, mask=exists, other=0.0)
    s2 = tl.load(at + 4 * plane, mask=exists, other=0.0)
    if LOSS == "brier":
        m = Moments(
            top, second, s1, s2,
            tl.load(at + 5 * plane, mask=exists, other=0.0), tl.load(at + 6 * plane, mask=exists, other=0.0),
            tl.load(at + 7 * plane, mask=exists, other=0.0), tl.load(at + 8 * plane, mask=exists, other=0.0),
            tl.load(at + 9 * plane, mask=exists, other=0.0),
        )  # fmt: skip
    else:
        m = Moments(top, second, s1, s2, s2, s2, s2, s2, s2)
    return merged(m, exists, LOSS, LOG), square


@triton.jit(do_not_specialize=["B", "N", "tiles"])
def finish_kernel(
    z_ptr, y_ptr, work_ptr, out_ptr, B, N, K, stride_zb, stride_zn, stride_yb, stride_yk, tiles,
    LOSS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, ALIGN_Z: tl.constexpr, PEEL: tl.constexpr,
    TILED: tl.constexpr,
):  # fmt: skip
    """Grid ``(B * tiles,)``, or ``(B,)`` if not ``TILED``: merge the moments of a row, and finish a tile or the row.

    ``statistics``, ``ones`` and ``uniform`` of a tile are parts, ``out`` ``(6, B, tiles)``: five sums of the tile, then
    the row's factor or its predicted class.
    """
    tile, row = tl.program_id(0), tl.program_id(0).to(tl.int64)
    if TILED:
        tile = tl.program_id(0) % tiles
        row = row // tiles
    m, square = merge_parts(work_ptr, row, tiles, B.to(tl.int64) * tiles, LOSS, LOG, PARTS)
    factor = features_factor(square, N, BIAS, MEAN)
    t = terms(m, LOSS, LOG)
    rows = row + tl.arange(0, 1)
    if TILED:
        n = multiple(N, ALIGN_Z)
        at, cols, whole = span(row, tile, n, stride_zb, stride_zn, BLOCK_N, ALIGN_Z, PEEL)
        inside = (cols >= 0) & (cols < n)
        z = load_tile(z_ptr, at, inside, whole, PEEL, float("-inf"))
        if KIND == "contrasts":
            v = scaled(value(z, broadcast(t), LOSS, LOG), factor[:, None], LOG)
            out, _, _ = span(row, tile, n, n, 1, BLOCK_N, ALIGN_Z, PEEL)
            if PEEL:
                if whole:
                    tl.store(out_ptr + out, v)
                else:
                    tl.store(out_ptr + out, v, mask=inside)
            else:
                tl.store(out_ptr + out, v, mask=inside)
        else:
            if KIND == "statistics":
                low, high, total, weighted, weight = statistics(z, inside, broadcast(t), LOSS)
                found = (low * factor, high * factor, total * factor, weighted * factor, weight, t.predicted * factor)
            else:
                first, second = constant_sums(z, inside, m, N, LOSS, KIND, LOG, False)
                found = (first, second, first, first, first, factor)
            for i in tl.static_range(6):
                tl.store(out_ptr + i * tl.num_programs(0).to(tl.int64) + rows * tiles + tile, found[i])
    else:
        store_labels(
            z_ptr, y_ptr, out_ptr, rows, rows >= 0, N, K, stride_zb, stride_zn, stride_yb, stride_yk, t, factor,
            LOSS, KIND, LOG, BLOCK_K,
        )  # fmt: skip
