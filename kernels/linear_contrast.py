"""The last layer fused with its contrast norms: features and weight in, logits and squared norms out.

A program owns a ``BLOCK_M x BLOCK_N`` tile of ``x W^T + b``. It rounds the tile to the logits' dtype, writes it, and
reduces *the rounded values* to moments (see ``losses``), so that the result equals that of the ``contrast`` kernels on
the logits written. The features' squared norm comes from the product's own loads if a row block has few tiles. If it
has many, each tile squares one slice of the features.

The partial moments of a row block are merged in the order of the tiles, so results do not depend on timing. With
``LAST``, which suits the few rows of a request, the last tile to arrive (by a counter in ``sync``) merges them. No
program waits for another. Otherwise ``contrast_finish_kernel`` does, in a second launch of many programs per row.
"""

import triton
import triton.language as tl

from .contrast import features_factor, square_sum
from .losses import contrast_coefficients, contrast_statistics, empty_moments, reduce_moments, rest_value
from .moments import add_tile, columns, load_plane, merge_parts, store_part, write_values


@triton.jit
def product_tile(
    x_rows, w_rows, D, stride_xd, stride_wd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Return ``(x W^T, ||x||^2)`` of one tile in float32, the norm only with ``NORM``; rows are given as pointers."""
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
    """Return the left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLS // 2]), (0, 2, 1)))


@triton.jit
def arrive(counter):
    """Publish this program's writes and count it; return how many came before."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit(do_not_specialize=["B", "N_units"])
def linear_contrast_kernel(
    x_ptr, w_ptr, bias_ptr, z_ptr, out_ptr, work_ptr, sync_ptr,
    B, N_units, D, stride_xb, stride_xd, stride_wn, stride_wd, slice_d,
    LOSS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_F: tl.constexpr, PARTS: tl.constexpr, LAST: tl.constexpr, NORM_IN_LOOP: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(groups * GROUP_M * tiles_n,)`` with ``groups = cdiv(cdiv(B, BLOCK_M), GROUP_M)``.

    ``work`` is float32 ``(PLANES, tiles_n, B)``; with ``LAST`` ``sync`` is int32 ``(tiles_m,)``, zero.
    """
    N = N_units * ALIGN_N
    tiles_m = tl.cdiv(B, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * tiles_n
    group = tl.program_id(0) // in_group
    place = tl.program_id(0) % in_group
    tile_m = group * GROUP_M + place % GROUP_M
    tile_n = place // GROUP_M

    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < B
    plane = tiles_n.to(tl.int64) * B
    z_rows = z_ptr + rows * N_units * ALIGN_N
    out_rows = out_ptr + rows * N_units * ALIGN_N
    work_rows = work_ptr + rows
    if tile_m < tiles_m:
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the end repeat the last one: no masks in the product, and nothing of them is stored.
        x_rows = x_ptr + tl.minimum(rows, B - 1) * stride_xb * ALIGN_X
        w_rows = w_ptr + tl.minimum(cols, N - 1).to(tl.int64) * stride_wn * ALIGN_W
        if NORM_IN_LOOP == 0:
            start = tl.minimum(tile_n * slice_d, D)
            features = square_sum(x_rows, valid, start, tl.minimum(start + slice_d, D), stride_xd, BLOCK_M, 16)
        acc, seen = product_tile(
            x_rows, w_rows, D, stride_xd, stride_wd, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, UPCAST,
            NORM_IN_LOOP,
        )  # fmt: skip
        rounded = add_bias(acc, bias_ptr, cols, N, HAS_BIAS).to(z_ptr.dtype.element_ty)
        inside = valid[:, None] & (cols < N)[None, :]
        tl.store(z_rows[:, None] + cols.to(tl.int64)[None, :], rounded, mask=inside)
        z = tl.where(inside, rounded.to(tl.float32), float("-inf"))
        moments = reduce_moments((z,), inside, LOSS, LOG, False, False)
        if NORM_IN_LOOP:
            features = tl.where(tile_n == 0, seen, 0.0)
        store_part(work_rows + tile_n.to(tl.int64) * B, plane, valid, moments, features)
        if LAST:  # noqa: SIM102 - a constant, and a condition at run time
            if arrive(sync_ptr + tile_m) == tiles_n - 1:
                moments, features = merge_parts(work_rows, tiles_n, B, plane, valid, LOSS, LOG, False, BLOCK_M, PARTS)
                factor = features_factor(features, N, HAS_BIAS, LOG, MEAN)
                write_values(z_rows, 1, out_rows, 0, N, valid, factor, moments, LOSS, LOG, BLOCK_F, True)


@triton.jit(do_not_specialize=["B", "N", "splits", "tiles_per_split"])
def linear_stats_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, work_ptr, sync_ptr,
    B, N, D, stride_xb, stride_xd, stride_wn, stride_wd, splits, tiles_per_split, slice_d,
    LOSS: tl.constexpr, MEAN: tl.constexpr, HAS_BIAS: tl.constexpr, EXTREMES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_W: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles_m * splits,)``: statistics over the contrasts; neither logits nor norms are ever written.

    A program merges the moments of ``tiles_per_split`` tiles as it goes. ``out`` is float32 ``(B, 5)``, ``work``
    float32 ``(PLANES, splits, B)`` and ``sync`` int32 ``(tiles_m,)``, zero.

    For brier a second launch finds the moments of the first in ``work``, repeats the product and takes the extremes of
    the values, in two planes from ``EXTREMES`` on (0: first launch).
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
        moments, features = merge_parts(work_ptr + rows, splits, B, plane, valid, LOSS, False, True, BLOCK_M, PARTS)
        factor = features_factor(features, N, HAS_BIAS, False, MEAN)
        coefficients = columns(contrast_coefficients(moments, LOSS, False))
        low = tl.zeros([BLOCK_M], tl.float32) + float("inf")
        high = -low
    else:
        moments = empty_moments(BLOCK_M, LOSS, True)
    for tile_n in range(first, last):
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        w_rows = w_ptr + tl.minimum(cols, N - 1).to(tl.int64) * stride_wn * ALIGN_W
        acc, _seen = product_tile(
            x_rows, w_rows, D, stride_xd, stride_wd, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, UPCAST, False
        )  # fmt: skip
        # Rounded as the logits would be, so that the statistics are those of the matrix never written.
        z = add_bias(acc, bias_ptr, cols, N, HAS_BIAS).to(x_ptr.dtype.element_ty).to(tl.float32)
        inside = valid[:, None] & (cols < N)[None, :]
        if EXTREMES:
            v = rest_value(z, coefficients, LOSS, False)
            other = inside & (z < coefficients[0])
            low = tl.minimum(low, tl.min(tl.where(other, v, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(other, v, float("-inf")), 1))
        else:
            # Half a tile at a time: its exponentials and their products fit the registers beside the tile.
            z_left, z_right = halves(tl.where(inside, z, float("-inf")), BLOCK_M, BLOCK_N)
            inside_left, inside_right = halves(inside, BLOCK_M, BLOCK_N)
            moments = add_tile(moments, z_left, inside_left, LOSS, False, True)
            moments = add_tile(moments, z_right, inside_right, LOSS, False, True)

    if EXTREMES:
        tl.store(at + EXTREMES * plane, low, mask=valid)
        tl.store(at + (EXTREMES + 1) * plane, high, mask=valid)
    else:
        start = tl.minimum(split * slice_d, D)
        features = square_sum(x_rows, valid, start, tl.minimum(start + slice_d, D), stride_xd, BLOCK_M, 16)
        store_part(at, plane, valid, moments, features)

    if arrive(sync_ptr + tile_m) == splits - 1:
        out_rows = out_ptr + rows * 5
        if EXTREMES:
            low = tl.load(out_rows, mask=valid, other=0.0)
            high = tl.load(out_rows + 1, mask=valid, other=0.0)
            for start in range(0, splits, PARTS):
                part = start + tl.arange(0, PARTS)
                exists = valid[:, None] & (part < splits)[None, :]
                ptrs = (work_ptr + EXTREMES * plane + rows)[:, None] + part.to(tl.int64)[None, :] * B
                v = tl.min(load_plane(ptrs, exists, float("inf")), 1) * factor
                low = tl.where(v < low, v, low)
                v = tl.max(load_plane(ptrs + plane, exists, float("-inf")), 1) * factor
                high = tl.where(v > high, v, high)
            tl.store(out_rows, low, mask=valid)
            tl.store(out_rows + 1, high, mask=valid)
        else:
            moments, features = merge_parts(work_ptr + rows, splits, B, plane, valid, LOSS, False, True, BLOCK_M, PARTS)
            factor = features_factor(features, N, HAS_BIAS, False, MEAN)
            statistics = contrast_statistics(moments, N, LOSS)
            for i in tl.static_range(5):
                tl.store(out_rows + i, statistics[i] * factor, mask=valid)
