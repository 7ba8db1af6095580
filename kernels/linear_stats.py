"""Statistics over all contrasts, from features and weight: neither logits nor norms ever leave the chip.

    out[b] = minimum, maximum, mean, softmax expectation and predicted class' value of ``contrast``'s norms of row b

- ``linear_stats_kernel``: a program owns ``BLOCK_M`` rows and walks through some tiles of ``x W^T + b``. It rounds each
  to the logits' dtype and reduces *the rounded values* to moments (see ``losses``): the result is the same as that of
  logits written to memory.
- ``stats_finish_kernel``: a program merges all parts of a row in a tree, whose order does not depend on timing.
"""

import triton
import triton.language as tl

from .contrast import features_factor, square_sum
from .losses import contrast_statistics, empty_moments
from .moments import add_tile, merge_parts, store_part


@triton.jit
def product_tile(
    x_rows, w_rows, D, stride_xd, stride_wd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return one tile of ``x W^T`` in float32, from pointers to the rows of x and W."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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
    return acc


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLS // 2]), (0, 2, 1)))


@triton.jit(do_not_specialize=["B", "N", "splits", "tiles_per_split"])
def linear_stats_kernel(
    x_ptr, w_ptr, bias_ptr, work_ptr,
    B, N, D, stride_xb, stride_xd, stride_wn, stride_wd, splits, tiles_per_split, slice_d,
    LOSS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_W: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles_m * splits,)``: moments of ``tiles_per_split`` tiles and the squares of ``slice_d`` features.

    ``work`` is float32 ``(PLANES, B, splits)``.
    """
    tile_m = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < B
    # Rows past the end repeat the last one: no masks in the product, and nothing of them is stored.
    x_rows = x_ptr + tl.minimum(rows, B - 1) * stride_xb * ALIGN_X
    first = split * tiles_per_split
    moments = empty_moments(BLOCK_M, LOSS, True)
    for tile_n in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(N, BLOCK_N))):
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        w_rows = w_ptr + tl.minimum(cols, N - 1).to(tl.int64) * stride_wn * ALIGN_W
        z = product_tile(
            x_rows, w_rows, D, stride_xd, stride_wd, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, UPCAST
        )  # fmt: skip
        if HAS_BIAS:
            z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        inside = valid[:, None] & (cols < N)[None, :]
        z = tl.where(inside, z.to(x_ptr.dtype.element_ty).to(tl.float32), float("-inf"))
        # Beside a tile, the registers hold the exponentials and products of half of it.
        z_left, z_right = halves(z, BLOCK_M, BLOCK_N)
        inside_left, inside_right = halves(inside, BLOCK_M, BLOCK_N)
        moments = add_tile(moments, z_left, inside_left, LOSS, False, True)
        moments = add_tile(moments, z_right, inside_right, LOSS, False, True)
    start = tl.minimum(split * slice_d, D)
    features = square_sum(x_rows, valid, start, tl.minimum(start + slice_d, D), stride_xd, BLOCK_M, 16)
    store_part(work_ptr + rows * splits + split, splits.to(tl.int64) * B, valid, moments, features)


@triton.jit(do_not_specialize=["N", "splits"])
def stats_finish_kernel(
    work_ptr, out_ptr, N, splits,
    LOSS: tl.constexpr, BIAS: tl.constexpr, MEAN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid ``(B,)``: statistics of a row, ``out`` float32 ``(B, 5)``, from what the other kernel left in ``work``."""
    row = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * splits
    moments, features = merge_parts(work_ptr + row * splits, splits, plane, LOSS, False, True, PARTS)
    factor = features_factor(features, N, BIAS, False, MEAN)
    statistics = contrast_statistics(moments, N, LOSS)
    for i in tl.static_range(5):
        tl.store(out_ptr + row * 5 + i + tl.arange(0, 1), statistics[i] * factor)
