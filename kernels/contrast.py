"""Squared norms of the last layer's gradients for all N one-hot contrasts, from features and logits.

    out[b, k] = ||delta^(k)(z_b)||^2 (||h_b||^2 + bias)        float32, or its logarithm

``fastgrad.ops.tune`` chooses one of three ways to the same numbers:

- ``contrast_rows_kernel``: a program owns whole rows, which stay on chip; the logits are read once.
- ``contrast_stream_kernel``: a program owns one row and sweeps it twice, moments first.
- ``contrast_moments_kernel`` then ``contrast_finish_kernel``: few long rows, each shared by several programs.

``ALIGN_*`` are powers of two that divide the row strides, which are passed divided by them. A stride of 1000 elements
is a multiple of 8, but the compiler emits 16-byte accesses only if it sees that factor.
"""

import triton
import triton.language as tl

from .losses import contrast_coefficients, reduce_moments
from .moments import contrast_values, load_block, merge_parts, store_part, sweep_moments, write_values


@triton.jit
def features_factor(square, N, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr):
    """Return ``||h||^2 + bias``, divided by N^2 if the loss is averaged over classes, or with ``LOG`` its logarithm."""
    if BIAS:
        square = square + 1.0
    if MEAN:
        n = tl.zeros_like(square) + N
        square = square / n / n
    if LOG:
        square = tl.log(square)
    return square


@triton.jit
def square_sum(h_ptrs, valid, start, stop, stride_d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the sums of squares over columns ``[start, stop)`` of the rows at ``h_ptrs``; ``(ROWS,)`` float32."""
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for d in range(start, stop, BLOCK_D):
        h, _ = load_block(h_ptrs, stride_d, d, stop, valid, BLOCK_D, 0.0)
        total += h * h
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["B", "N_units"])
def contrast_rows_kernel(
    h_ptr, z_ptr, out_ptr, B, N_units, D, stride_hb, stride_hd, stride_zb, stride_zn,
    LOSS: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr, ALIGN_Z: tl.constexpr, ALIGN_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(cdiv(B, ROWS),)``: rows of up to ``BLOCK_N`` logits, read once."""
    N = N_units * ALIGN_N
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < B
    z, inside = load_block(z_ptr + rows * stride_zb * ALIGN_Z, stride_zn, 0, N, valid, BLOCK_N, float("-inf"))
    square = square_sum(h_ptr + rows * stride_hb * ALIGN_H, valid, 0, D, stride_hd, ROWS, BLOCK_D)
    factor = features_factor(square, N, BIAS, LOG, MEAN)
    coefficients = contrast_coefficients(reduce_moments((z,), inside, LOSS, LOG, False, False), LOSS, LOG)
    v = contrast_values(z, factor, coefficients, LOSS, LOG)
    cols = tl.arange(0, BLOCK_N).to(tl.int64)
    tl.store(out_ptr + (rows * N_units * ALIGN_N)[:, None] + cols[None, :], v, mask=inside)


@triton.jit(do_not_specialize=["N_units"])
def contrast_stream_kernel(
    h_ptr, z_ptr, out_ptr, N_units, D, stride_hb, stride_hd, stride_zb, stride_zn,
    LOSS: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr, ALIGN_Z: tl.constexpr, ALIGN_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(B,)``: one row each, any N, two sweeps of which the second finds the logits in cache."""
    N = N_units * ALIGN_N
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    valid = tl.full([1], True, tl.int1)
    features = square_sum(h_ptr + rows * stride_hb * ALIGN_H, valid, 0, D, stride_hd, 1, BLOCK_D)
    factor = features_factor(features, N, BIAS, LOG, MEAN)
    z_rows = z_ptr + rows * stride_zb * ALIGN_Z
    moments = sweep_moments(z_rows, stride_zn, 0, N, valid, LOSS, LOG, 1, BLOCK_N)
    write_values(
        z_rows, stride_zn, out_ptr + rows * N_units * ALIGN_N, 0, N, valid, factor, moments, LOSS, LOG, BLOCK_N
    )  # fmt: skip


@triton.jit(do_not_specialize=["N_units", "splits"])
def contrast_moments_kernel(
    h_ptr, z_ptr, work_ptr, N_units, D, stride_hb, stride_hd, stride_zb, stride_zn, splits, chunk_n, chunk_d,
    LOSS: tl.constexpr, LOG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr, ALIGN_Z: tl.constexpr, ALIGN_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(B * splits,)``: moments of ``chunk_n`` logits and the squares of ``chunk_d`` features of a row.

    ``work`` is float32 ``(PLANES, B, splits)``.
    """
    N = N_units * ALIGN_N
    split = tl.program_id(0) % splits
    rows = (tl.program_id(0) // splits).to(tl.int64) + tl.arange(0, 1)
    valid = tl.full([1], True, tl.int1)
    features = square_sum(
        h_ptr + rows * stride_hb * ALIGN_H, valid, split * chunk_d, tl.minimum(D, (split + 1) * chunk_d),
        stride_hd, 1, BLOCK_D,
    )  # fmt: skip
    start = split * chunk_n
    moments = sweep_moments(
        z_ptr + rows * stride_zb * ALIGN_Z, stride_zn, start, tl.minimum(N, start + chunk_n), valid, LOSS, LOG, 1,
        BLOCK_N,
    )  # fmt: skip
    store_part(work_ptr + rows * splits + split, tl.num_programs(0).to(tl.int64), valid, moments, features)


@triton.jit(do_not_specialize=["N_units", "splits"])
def contrast_finish_kernel(
    z_ptr, work_ptr, out_ptr, N_units, stride_zb, stride_zn, splits, chunk_n,
    LOSS: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, ALIGN_Z: tl.constexpr, ALIGN_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(B * splits,)``: merge a row's partial moments and write ``chunk_n`` of its values."""
    N = N_units * ALIGN_N
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64)
    moments, features = merge_parts(work_ptr + row * splits, splits, plane, LOSS, LOG, False, PARTS)
    factor = features_factor(features, N, BIAS, LOG, MEAN)
    start = split * chunk_n
    rows = row + tl.arange(0, 1)
    write_values(
        z_ptr + rows * stride_zb * ALIGN_Z, stride_zn, out_ptr + rows * N_units * ALIGN_N, start,
        tl.minimum(N, start + chunk_n), tl.full([1], True, tl.int1), factor, moments, LOSS, LOG, BLOCK_N,
    )  # fmt: skip
