# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Squared norms of the last layer's gradients for all N one-hot contrasts, from features and logits.

    out[b, k] = ||delta^(k)(z_b)||^2 (||h_b||^2 + bias)        float32, or its logarithm

Three ways to the same numbers, chosen by ``fastgrad.ops.heuristics``:

- ``contrast_rows_kernel``: a program owns whole rows, which stay on chip; the logits are read once.
- ``contrast_stream_kernel``: a program owns one row and sweeps it twice, moments first.
- ``contrast_moments_kernel`` then ``contrast_finish_kernel``: few long rows, each shared by several programs.

``ALIGN_*`` are powers of two dividing the row strides, which are passed divided by them: a stride of 1000 elements
is a multiple of 8, and only a factor the compiler can see makes 16-byte accesses legal.
"""

import triton
import triton.language as tl

from .moments import (
    contrast_coefficients,
    contrast_value,
    empty_moments,
    merge_moments,
    reduce_moments,
    tile_moments,
)


@triton.jit
def features_factor(square, N, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr):
    """``(||h||^2 + bias)``, over N^2 for losses averaged over classes; its logarithm with ``LOG``."""
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
    """Sum of squares over the columns ``[start, stop)`` of the rows at ``h_ptrs``; ``(ROWS,)`` float32."""
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for d in range(start, stop, BLOCK_D):
        offs = d + tl.arange(0, BLOCK_D)
        inside = valid[:, None] & (offs < stop)[None, :]
        h = tl.load(h_ptrs[:, None] + offs.to(tl.int64)[None, :] * stride_d, mask=inside, other=0.0).to(
            tl.float32
        )
        total += h * h
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["B", "N_units"])
def contrast_rows_kernel(
    h_ptr,
    z_ptr,
    out_ptr,
    B,
    N_units,
    D,
    stride_hb,
    stride_hd,
    stride_zb,
    stride_zn,
    LOSS: tl.constexpr,
    BIAS: tl.constexpr,
    LOG: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    ALIGN_N: tl.constexpr,
):
    """Grid ``(cdiv(B, ROWS),)``: rows of up to ``BLOCK_N`` logits, read once."""
    N = N_units * ALIGN_N
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < B
    cols = tl.arange(0, BLOCK_N)
    inside = valid[:, None] & (cols < N)[None, :]
    z_ptrs = z_ptr + (rows * stride_zb * ALIGN_Z)[:, None] + cols.to(tl.int64)[None, :] * stride_zn
    z = tl.load(z_ptrs, mask=inside, other=float("-inf")).to(tl.float32)
    square = square_sum(h_ptr + rows * stride_hb * ALIGN_H, valid, 0, D, stride_hd, ROWS, BLOCK_D)
    factor = features_factor(square, N, BIAS, LOG, MEAN)

    m, m2, a1, a2, a3, a4, a5, a6, a7 = tile_moments(z, inside, LOSS, LOG, False)
    m, base, top, c0, c1, c2, c3, c4, c5 = contrast_coefficients(m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, LOG)
    v = contrast_value(
        z, m[:, None], base[:, None], top[:, None], c0[:, None], c1[:, None], c2[:, None], c3[:, None], c4[:, None],
        c5[:, None], LOSS, LOG,
    )  # fmt: skip
    v = v + factor[:, None] if LOG else v * factor[:, None]
    tl.store(out_ptr + (rows * N_units * ALIGN_N)[:, None] + cols.to(tl.int64)[None, :], v, mask=inside)


@triton.jit
def sweep_moments(
    z_row,
    start,
    stop,
    stride_n,
    LOSS: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATS: tl.constexpr,
):
    """Moments ``(1,)`` of the columns ``[start, stop)`` of one row, block after block."""
    m, m2, a1, a2, a3, a4, a5, a6, a7 = empty_moments(1, LOSS, STATS)
    for n in range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        inside = (cols < stop)[None, :]
        z_ptrs = z_row + cols.to(tl.int64)[None, :] * stride_n
        z = tl.load(z_ptrs, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        n1, n2, b1, b2, b3, b4, b5, b6, b7 = tile_moments(z, inside, LOSS, LOG, STATS)
        m, m2, a1, a2, a3, a4, a5, a6, a7 = merge_moments(
            m, m2, a1, a2, a3, a4, a5, a6, a7, n1, n2, b1, b2, b3, b4, b5, b6, b7, LOSS, LOG, STATS
        )
    return m, m2, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def sweep_values(
    z_row, out_row, start, stop, stride_n, factor, m, base, top, c0, c1, c2, c3, c4, c5,
    LOSS: tl.constexpr, LOG: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the columns ``[start, stop)`` of one row; the coefficients are ``(1,)``."""
    for n in range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        inside = (cols < stop)[None, :]
        offs = cols.to(tl.int64)[None, :]
        z = tl.load(
            z_row + offs * stride_n, mask=inside, other=float("-inf"), eviction_policy="evict_first"
        ).to(tl.float32)  # fmt: skip
        v = contrast_value(
            z, m[:, None], base[:, None], top[:, None], c0[:, None], c1[:, None], c2[:, None], c3[:, None],
            c4[:, None], c5[:, None], LOSS, LOG,
        )  # fmt: skip
        v = v + factor[:, None] if LOG else v * factor[:, None]
        tl.store(out_row + offs, v, mask=inside)


@triton.jit(do_not_specialize=["N_units"])
def contrast_stream_kernel(
    h_ptr,
    z_ptr,
    out_ptr,
    N_units,
    D,
    stride_hb,
    stride_hd,
    stride_zb,
    stride_zn,
    LOSS: tl.constexpr,
    BIAS: tl.constexpr,
    LOG: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    ALIGN_N: tl.constexpr,
):
    """Grid ``(B,)``: one row each, any N, two sweeps of which the second finds the logits in cache."""
    N = N_units * ALIGN_N
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    square = square_sum(h_ptr + rows * stride_hb * ALIGN_H, rows >= 0, 0, D, stride_hd, 1, BLOCK_D)
    factor = features_factor(square, N, BIAS, LOG, MEAN)
    z_row = z_ptr + row * stride_zb * ALIGN_Z
    m, m2, a1, a2, a3, a4, a5, a6, a7 = sweep_moments(z_row, 0, N, stride_zn, LOSS, LOG, BLOCK_N, False)
    m, base, top, c0, c1, c2, c3, c4, c5 = contrast_coefficients(m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, LOG)
    sweep_values(
        z_row, out_ptr + row * N_units * ALIGN_N, 0, N, stride_zn, factor, m, base, top, c0, c1, c2, c3, c4, c5,
        LOSS, LOG, BLOCK_N,
    )  # fmt: skip


@triton.jit
def store_moments(
    ptrs, stride, mask, m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS: tl.constexpr, STATS: tl.constexpr
):  # fmt: skip
    """Write the moments the loss uses, one plane of ``stride`` elements each."""
    tl.store(ptrs, m, mask=mask)
    tl.store(ptrs + stride, m2, mask=mask)
    tl.store(ptrs + 2 * stride, a2, mask=mask)
    if ((LOSS == "cross_entropy") or (LOSS == "brier")) or STATS:
        tl.store(ptrs + 3 * stride, a1, mask=mask)
    if (LOSS == "brier") or STATS:
        tl.store(ptrs + 4 * stride, a3, mask=mask)
        tl.store(ptrs + 5 * stride, a4, mask=mask)
        tl.store(ptrs + 6 * stride, a5, mask=mask)
    if LOSS == "brier":
        tl.store(ptrs + 7 * stride, a6, mask=mask)
        tl.store(ptrs + 8 * stride, a7, mask=mask)


@triton.jit
def load_moments(ptrs, stride, mask, LOSS: tl.constexpr, STATS: tl.constexpr):
    """Read what ``store_moments`` wrote, past the first-level cache; outside ``mask`` the empty row."""
    lowest = float("-inf")
    m = tl.load(ptrs, mask=mask, other=lowest, cache_modifier=".cg")
    m2 = tl.load(ptrs + stride, mask=mask, other=lowest, cache_modifier=".cg")
    a2 = tl.load(ptrs + 2 * stride, mask=mask, other=0.0, cache_modifier=".cg")
    zero = tl.zeros_like(m)
    a1, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero
    if ((LOSS == "cross_entropy") or (LOSS == "brier")) or STATS:
        a1 = tl.load(ptrs + 3 * stride, mask=mask, other=0.0, cache_modifier=".cg")
    if (LOSS == "brier") or STATS:
        a3 = tl.load(ptrs + 4 * stride, mask=mask, other=0.0, cache_modifier=".cg")
        a4 = tl.load(ptrs + 5 * stride, mask=mask, other=0.0, cache_modifier=".cg")
        if LOSS == "brier":
            a5 = tl.load(ptrs + 6 * stride, mask=mask, other=0.0, cache_modifier=".cg")
            a6 = tl.load(ptrs + 7 * stride, mask=mask, other=0.0, cache_modifier=".cg")
            a7 = tl.load(ptrs + 8 * stride, mask=mask, other=0.0, cache_modifier=".cg")
        else:
            a5 = tl.load(ptrs + 6 * stride, mask=mask, other=float("inf"), cache_modifier=".cg")
    return m, m2, a1, a2, a3, a4, a5, a6, a7


@triton.jit(do_not_specialize=["N_units", "splits"])
def contrast_moments_kernel(
    h_ptr,
    z_ptr,
    work_ptr,
    N_units,
    D,
    stride_hb,
    stride_hd,
    stride_zb,
    stride_zn,
    splits,
    chunk_n,
    chunk_d,
    LOSS: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    ALIGN_N: tl.constexpr,
):
    """Grid ``(B * splits,)``: moments of ``chunk_n`` logits and the squares of ``chunk_d`` features of a row.

    ``work`` is float32 ``(10, B, splits)``: nine planes of moments, then the partial squares.
    """
    N = N_units * ALIGN_N
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    at = work_ptr + rows * splits + split
    square = square_sum(
        h_ptr + rows * stride_hb * ALIGN_H, rows >= 0, split * chunk_d, tl.minimum(D, (split + 1) * chunk_d),
        stride_hd, 1, BLOCK_D,
    )  # fmt: skip
    tl.store(at + 9 * plane, square)
    start = split * chunk_n
    stop = tl.minimum(N, start + chunk_n)
    m, m2, a1, a2, a3, a4, a5, a6, a7 = sweep_moments(
        z_ptr + row * stride_zb * ALIGN_Z, start, stop, stride_zn, LOSS, LOG, BLOCK_N, False
    )
    store_moments(at, plane, rows >= 0, m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, False)


@triton.jit(do_not_specialize=["N_units", "splits"])
def contrast_finish_kernel(
    z_ptr,
    work_ptr,
    out_ptr,
    N_units,
    stride_zb,
    stride_zn,
    splits,
    chunk_n,
    LOSS: tl.constexpr,
    BIAS: tl.constexpr,
    LOG: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    ALIGN_N: tl.constexpr,
):
    """Grid ``(B * splits,)``: merge a row's partial moments and write ``chunk_n`` of its values."""
    N = N_units * ALIGN_N
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64)
    parts = tl.arange(0, SPLITS)[None, :]
    exists = parts < splits
    at = work_ptr + row * splits + parts
    m, m2, a1, a2, a3, a4, a5, a6, a7 = load_moments(at, plane, exists, LOSS, False)
    square = tl.sum(tl.load(at + 9 * plane, mask=exists, other=0.0), 1)
    factor = features_factor(square, N, BIAS, LOG, MEAN)
    m, m2, a1, a2, a3, a4, a5, a6, a7 = reduce_moments(
        m, m2, a1, a2, a3, a4, a5, a6, a7, exists, LOSS, LOG, False, True
    )
    m, base, top, c0, c1, c2, c3, c4, c5 = contrast_coefficients(m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, LOG)
    start = split * chunk_n
    sweep_values(
        z_ptr + row * stride_zb * ALIGN_Z, out_ptr + row * N_units * ALIGN_N, start, tl.minimum(N, start + chunk_n),
        stride_zn, factor, m, base, top, c0, c1, c2, c3, c4, c5, LOSS, LOG, BLOCK_N,
    )  # fmt: skip
