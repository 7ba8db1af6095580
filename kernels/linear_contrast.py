# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""The last layer fused with its contrast norms: features and weight in, logits and squared norms out, one launch.

A program owns a ``BLOCK_M x BLOCK_N`` tile of ``x W^T + b``. It rounds the tile to the logits' dtype, writes it, and
reduces *the rounded values* to leave-one-out moments (see ``moments``), so that the result equals that of the unfused
``contrast`` kernels on the logits written. The features' squared norm comes from the product's own loads where a row
block has few tiles; where it has many, each tile squares one slice of the features, which the product has just put
into the cache.

The last tile of a row block to arrive (a counter in ``sync``, zero before the launch) merges the partial moments, in
the order of the tiles whichever arrived last, so results do not depend on timing. Then

- ``CHUNKS = 0``: the same program turns the row block's logits into norms: right for the few rows of a request.
- ``CHUNKS > 0``: that many further programs per row block do it, each a range of columns, while the other programs
  go on with the product. Programs take their work in the order in which they start (a ticket), and a program only
  waits for work with smaller tickets, which is therefore running and never waits itself: no deadlock, whatever else
  the device is doing.
"""

import triton
import triton.language as tl

from .contrast import features_factor, load_moments, square_sum, store_moments
from .moments import (
    contrast_coefficients,
    contrast_statistics,
    contrast_value,
    empty_moments,
    merge_moments,
    reduce_moments,
    rest_value,
    tile_moments,
)


@triton.jit
def product_tile(
    x_rows,
    w_rows,
    D,
    stride_xd,
    stride_wd,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    NORM: tl.constexpr,
):
    """``(x W^T, ||x||^2)`` of one tile in float32, the norm only with ``NORM``; rows are given as pointers."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_M, BLOCK_K] if NORM else [1, 1], tl.float32)
    for k in range(0, D, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x_ptrs = x_rows[:, None] + ks.to(tl.int64)[None, :] * stride_xd
        w_ptrs = w_rows[:, None] + ks.to(tl.int64)[None, :] * stride_wd
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(ks < D)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(ks < D)[None, :], other=0.0)
        if UPCAST:
            # The interpreter multiplies bfloat16 wrongly.
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if NORM:
            x = x.to(tl.float32)
            square += x * x
    return acc, tl.sum(square, 1)


@triton.jit
def add_bias(acc, bias_ptr, cols, N, HAS_BIAS: tl.constexpr):
    """Add the bias of each column to a tile."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLS // 2]), (0, 2, 1)))


@triton.jit
def arrive(counter):
    """Publish this program's writes and count it; returns how many came before."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def merge_parts(
    at, parts, stride_part, plane, valid,
    BLOCK_M: tl.constexpr, PARTS: tl.constexpr, LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Merge the partial moments of a row block, ``PARTS`` at a time in their order, and add up its partial squares.

    ``at`` ``(BLOCK_M,)`` points to each row's first part.
    """
    m, m2, a1, a2, a3, a4, a5, a6, a7 = empty_moments(BLOCK_M, LOSS, STATS)
    square = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        exists = valid[:, None] & (part < parts)[None, :]
        ptrs = at[:, None] + part.to(tl.int64)[None, :] * stride_part
        n, n2, b1, b2, b3, b4, b5, b6, b7 = load_moments(ptrs, plane, exists, LOSS, STATS)
        square += tl.sum(tl.load(ptrs + 9 * plane, mask=exists, other=0.0, cache_modifier=".cg"), 1)
        n, n2, b1, b2, b3, b4, b5, b6, b7 = reduce_moments(
            n, n2, b1, b2, b3, b4, b5, b6, b7, exists, LOSS, LOG, STATS, True
        )
        m, m2, a1, a2, a3, a4, a5, a6, a7 = merge_moments(
            m, m2, a1, a2, a3, a4, a5, a6, a7, n, n2, b1, b2, b3, b4, b5, b6, b7, LOSS, LOG, STATS
        )
    return m, m2, a1, a2, a3, a4, a5, a6, a7, square


@triton.jit
def finish_rows(
    z_rows, out_rows, valid, start, stop, factor, m, m2, a1, a2, a3, a4, a5, a6, a7,
    LOSS: tl.constexpr, LOG: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Turn the columns ``[start, stop)`` of a row block's logits into squared norms."""
    m, base, top, c0, c1, c2, c3, c4, c5 = contrast_coefficients(m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, LOG)
    for n in range(start, stop, BLOCK_F):
        cols = n + tl.arange(0, BLOCK_F)
        inside = valid[:, None] & (cols < stop)[None, :]
        offs = cols.to(tl.int64)[None, :]
        z = tl.load(z_rows[:, None] + offs, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        v = contrast_value(
            z, m[:, None], base[:, None], top[:, None], c0[:, None], c1[:, None], c2[:, None], c3[:, None],
            c4[:, None], c5[:, None], LOSS, LOG,
        )  # fmt: skip
        v = v + factor[:, None] if LOG else v * factor[:, None]
        tl.store(out_rows[:, None] + offs, v, mask=inside)


@triton.jit(do_not_specialize=["B", "N_units"])
def linear_contrast_kernel(
    x_ptr, w_ptr, bias_ptr, z_ptr, out_ptr, work_ptr, sync_ptr,
    B, N_units, D, stride_xb, stride_xd, stride_wn, stride_wd, slice_d, chunk_n,
    LOSS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_F: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, NORM_IN_LOOP: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(groups * GROUP_M * (tiles_n + CHUNKS),)`` with ``groups = cdiv(cdiv(B, BLOCK_M), GROUP_M)``.

    ``work`` is float32 ``(10, tiles_n + 1, B)``: planes of moments and partial squares by tile, the last slot merged.
    ``sync`` is int32 ``(1 + 2 * tiles_m,)``, zero: the ticket, then arrivals and the merged flag of each row block.
    """
    N = N_units * ALIGN_N
    tiles_m = tl.cdiv(B, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    groups = tl.cdiv(tiles_m, GROUP_M)
    ticket = tl.program_id(0)
    if CHUNKS > 0:
        ticket = tl.atomic_add(sync_ptr, 1)

    # A group's tiles; then, period after period, the next group's tiles and this group's chunks.
    in_group = GROUP_M * tiles_n
    later = tl.maximum(ticket - in_group, 0)
    period = in_group + GROUP_M * CHUNKS
    group = later // period
    place = later % period
    first = ticket < in_group
    more = group < groups - 1
    is_tile = first | (more & (place < in_group))
    place = tl.where(first, ticket, tl.where(more & (place >= in_group), place - in_group, place))
    group = tl.where(first, 0, tl.where(is_tile, group + 1, group))
    tile_m = group * GROUP_M + place % GROUP_M
    tile_n = place // GROUP_M

    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < B
    plane = (tiles_n + 1).to(tl.int64) * B
    z_rows = z_ptr + rows * N_units * ALIGN_N
    out_rows = out_ptr + rows * N_units * ALIGN_N
    arrivals = sync_ptr + 1 + tile_m
    merged_flag = arrivals + tiles_m
    merged_at = work_ptr + tiles_n.to(tl.int64) * B + rows
    if (tile_m < tiles_m) & is_tile:
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the end repeat the last one: no masks in the product, and nothing of them is stored.
        x_rows = x_ptr + tl.minimum(rows, B - 1) * stride_xb * ALIGN_X
        w_rows = w_ptr + tl.minimum(cols, N - 1).to(tl.int64) * stride_wn * ALIGN_W
        if NORM_IN_LOOP == 0:
            start = tl.minimum(tile_n * slice_d, D)
            part = square_sum(x_rows, valid, start, tl.minimum(start + slice_d, D), stride_xd, BLOCK_M, 16)
        acc, seen = product_tile(
            x_rows, w_rows, D, stride_xd, stride_wd, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, UPCAST,
            NORM_IN_LOOP,
        )  # fmt: skip
        rounded = add_bias(acc, bias_ptr, cols, N, HAS_BIAS).to(z_ptr.dtype.element_ty)
        inside = valid[:, None] & (cols < N)[None, :]
        tl.store(z_rows[:, None] + cols.to(tl.int64)[None, :], rounded, mask=inside)
        m, m2, a1, a2, a3, a4, a5, a6, a7 = tile_moments(rounded.to(tl.float32), inside, LOSS, LOG, False)
        if NORM_IN_LOOP:
            part = tl.where(tile_n == 0, seen, 0.0)
        at = work_ptr + tile_n.to(tl.int64) * B + rows
        store_moments(at, plane, valid, m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, False)
        tl.store(at + 9 * plane, part, mask=valid)

        if arrive(arrivals) == tiles_n - 1:
            m, m2, a1, a2, a3, a4, a5, a6, a7, square = merge_parts(
                work_ptr + rows, tiles_n, B, plane, valid, BLOCK_M, PARTS, LOSS, LOG, False
            )
            if CHUNKS > 0:
                store_moments(merged_at, plane, valid, m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, False)
                tl.store(merged_at + 9 * plane, square, mask=valid)
                arrive(merged_flag)
            else:
                factor = features_factor(square, N, HAS_BIAS, LOG, MEAN)
                finish_rows(
                    z_rows,
                    out_rows,
                    valid,
                    0,
                    N,
                    factor,
                    m,
                    m2,
                    a1,
                    a2,
                    a3,
                    a4,
                    a5,
                    a6,
                    a7,
                    LOSS,
                    LOG,
                    BLOCK_F,
                )
    if CHUNKS > 0:  # noqa: SIM102 - a constant, and a condition at run time
        if (tile_m < tiles_m) & (is_tile == 0):
            while tl.atomic_add(merged_flag, 0, sem="acquire", scope="gpu") == 0:
                pass
            m, m2, a1, a2, a3, a4, a5, a6, a7 = load_moments(merged_at, plane, valid, LOSS, False)
            square = tl.load(merged_at + 9 * plane, mask=valid, other=0.0, cache_modifier=".cg")
            factor = features_factor(square, N, HAS_BIAS, LOG, MEAN)
            start = tile_n * chunk_n
            finish_rows(
                z_rows, out_rows, valid, start, tl.minimum(N, start + chunk_n), factor,
                m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, LOG, BLOCK_F,
            )  # fmt: skip


@triton.jit(do_not_specialize=["B", "N", "splits"])
def linear_stats_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, work_ptr, state_ptr, sync_ptr,
    B, N, D, stride_xb, stride_xd, stride_wn, stride_wd, splits, tiles_per_split, slice_d,
    LOSS: tl.constexpr, MEAN: tl.constexpr, HAS_BIAS: tl.constexpr, EXTREMES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_W: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles_m * splits,)``: statistics over the contrasts; neither logits nor norms are ever written.

    A program merges the moments of ``tiles_per_split`` tiles as it goes. ``out`` is float32 ``(B, 5)``: minimum,
    maximum, mean, softmax expectation, value of the predicted class. ``work`` is float32 ``(10, splits, B)``,
    ``state`` ``(9, B)`` and ``sync`` int32 ``(tiles_m,)``, zero.

    For brier the extremes are not those of the logits: a first launch leaves the rows' coefficients in ``state``, a
    second one with ``EXTREMES`` repeats the product and takes the extremes of the values.
    """
    tile_m = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < B
    plane = splits.to(tl.int64) * B
    x_rows = x_ptr + tl.minimum(rows, B - 1) * stride_xb * ALIGN_X
    at = work_ptr + split.to(tl.int64) * B + rows
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(N, BLOCK_N))

    if EXTREMES:
        m = tl.load(state_ptr + rows, mask=valid, other=0.0)
        base = tl.load(state_ptr + B + rows, mask=valid, other=0.0)
        c0 = tl.load(state_ptr + 2 * B + rows, mask=valid, other=0.0)
        c1 = tl.load(state_ptr + 3 * B + rows, mask=valid, other=0.0)
        c2 = tl.load(state_ptr + 4 * B + rows, mask=valid, other=0.0)
        c3 = tl.load(state_ptr + 5 * B + rows, mask=valid, other=0.0)
        c4 = tl.load(state_ptr + 6 * B + rows, mask=valid, other=0.0)
        c5 = tl.load(state_ptr + 7 * B + rows, mask=valid, other=0.0)
        factor = tl.load(state_ptr + 8 * B + rows, mask=valid, other=0.0)
        low = tl.zeros([BLOCK_M], tl.float32) + float("inf")
        high = -low
    else:
        m, m2, a1, a2, a3, a4, a5, a6, a7 = empty_moments(BLOCK_M, LOSS, True)
    for tile_n in range(first, last):
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        w_rows = w_ptr + tl.minimum(cols, N - 1).to(tl.int64) * stride_wn * ALIGN_W
        acc, _ = product_tile(
            x_rows,
            w_rows,
            D,
            stride_xd,
            stride_wd,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            EVEN_K,
            PRECISION,
            UPCAST,
            False,
        )
        # Rounded as the logits would be, so that the statistics are those of the matrix never written.
        z = add_bias(acc, bias_ptr, cols, N, HAS_BIAS).to(x_ptr.dtype.element_ty).to(tl.float32)
        inside = valid[:, None] & (cols < N)[None, :]
        if EXTREMES:
            v = rest_value(
                z, base[:, None], c0[:, None], c1[:, None], c2[:, None], c3[:, None], c4[:, None], c5[:, None],
                LOSS, False,
            )  # fmt: skip
            other = inside & (z < m[:, None])
            low = tl.minimum(low, tl.min(tl.where(other, v, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(other, v, float("-inf")), 1))
        else:
            # Half a tile at a time: its exponentials and their products fit the registers beside the tile.
            z_low, z_high = halves(z, BLOCK_M, BLOCK_N)
            inside_low, inside_high = halves(inside, BLOCK_M, BLOCK_N)
            n, n2, b1, b2, b3, b4, b5, b6, b7 = tile_moments(z_low, inside_low, LOSS, False, True)
            m, m2, a1, a2, a3, a4, a5, a6, a7 = merge_moments(
                m, m2, a1, a2, a3, a4, a5, a6, a7, n, n2, b1, b2, b3, b4, b5, b6, b7, LOSS, False, True
            )
            n, n2, b1, b2, b3, b4, b5, b6, b7 = tile_moments(z_high, inside_high, LOSS, False, True)
            m, m2, a1, a2, a3, a4, a5, a6, a7 = merge_moments(
                m, m2, a1, a2, a3, a4, a5, a6, a7, n, n2, b1, b2, b3, b4, b5, b6, b7, LOSS, False, True
            )

    if EXTREMES:
        tl.store(at, low, mask=valid)
        tl.store(at + plane, high, mask=valid)
    else:
        start = tl.minimum(split * slice_d, D)
        square = square_sum(x_rows, valid, start, tl.minimum(start + slice_d, D), stride_xd, BLOCK_M, 16)
        store_moments(at, plane, valid, m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, True)
        tl.store(at + 9 * plane, square, mask=valid)

    if arrive(sync_ptr + tile_m) == splits - 1:
        out_rows = out_ptr + rows * 5
        if EXTREMES:
            low = tl.load(out_rows, mask=valid, other=0.0)
            high = tl.load(out_rows + 1, mask=valid, other=0.0)
            for start in range(0, splits, PARTS):
                part = start + tl.arange(0, PARTS)
                exists = valid[:, None] & (part < splits)[None, :]
                ptrs = (work_ptr + rows)[:, None] + part.to(tl.int64)[None, :] * B
                v = tl.load(ptrs, mask=exists, other=float("inf"), cache_modifier=".cg")
                v = tl.min(v, 1) * factor
                low = tl.where(v < low, v, low)
                v = tl.load(ptrs + plane, mask=exists, other=float("-inf"), cache_modifier=".cg")
                v = tl.max(v, 1) * factor
                high = tl.where(v > high, v, high)
            tl.store(out_rows, low, mask=valid)
            tl.store(out_rows + 1, high, mask=valid)
        else:
            m, m2, a1, a2, a3, a4, a5, a6, a7, square = merge_parts(
                work_ptr + rows, splits, B, plane, valid, BLOCK_M, PARTS, LOSS, False, True
            )
            factor = features_factor(square, N, HAS_BIAS, False, MEAN)
            _, base, top, c0, c1, c2, c3, c4, c5 = contrast_coefficients(
                m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, False
            )
            low, high, mean, expected, predicted = contrast_statistics(
                m, m2, a1, a2, a3, a4, a5, N, top, base, c0, c1, c2, c3, c4, c5, LOSS
            )
            tl.store(out_rows, low * factor, mask=valid)
            tl.store(out_rows + 1, high * factor, mask=valid)
            tl.store(out_rows + 2, mean * factor, mask=valid)
            tl.store(out_rows + 3, expected * factor, mask=valid)
            tl.store(out_rows + 4, predicted * factor, mask=valid)
            if LOSS == "brier":
                tl.store(state_ptr + rows, m, mask=valid)
                tl.store(state_ptr + B + rows, base, mask=valid)
                tl.store(state_ptr + 2 * B + rows, c0, mask=valid)
                tl.store(state_ptr + 3 * B + rows, c1, mask=valid)
                tl.store(state_ptr + 4 * B + rows, c2, mask=valid)
                tl.store(state_ptr + 5 * B + rows, c3, mask=valid)
                tl.store(state_ptr + 6 * B + rows, c4, mask=valid)
                tl.store(state_ptr + 7 * B + rows, c5, mask=valid)
                tl.store(state_ptr + 8 * B + rows, factor, mask=valid)
