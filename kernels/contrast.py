"""Squared norms of the last layer's gradients for all N one-hot contrasts: the formula, in rows that stay on chip.

With the two largest logits ``m >= r`` of a row, ``f = exp(z - r)``, the sums ``s1`` of f and ``s2`` of f^2 over all
logits but one largest, ``rho = exp(r - m)`` and ``a = 1 + rho s1``, which is the sum of ``exp(z - m)``:

    ||p - e_k||^2  =  rho^2 (s1^2 + s2) / a^2  +  2 (1 - exp(z_k - m)) / a

The first term is the norm of the predicted class, for which the second is 0. No term is negative, so nothing cancels;
sums that are scaled by the second logit never underflow. The norms of ``bce`` and ``mse`` have the same form. Their
logarithms, ``brier``, longer rows, single labels and statistics are in ``general``.
"""

import triton
import triton.language as tl

from .numerics import exp_difference, sigmoid, two_largest


@triton.jit
def multiple(n, ALIGN: tl.constexpr):
    """Return ``n``, a multiple of ``ALIGN``: the compiler emits 16-byte accesses only if it sees that factor."""
    return n // ALIGN * ALIGN


@triton.jit
def load_rows(
    ptr, rows, valid, N, stride_b, stride_n, BLOCK: tl.constexpr, ALIGN: tl.constexpr, other: tl.constexpr
):  # fmt: skip
    """Return the first ``BLOCK`` columns of rows in float32, and which of them exist."""
    cols = tl.arange(0, BLOCK)
    inside = valid[:, None] & (cols < multiple(N, ALIGN))[None, :]
    at = (rows * multiple(stride_b, ALIGN))[:, None] + cols.to(tl.int64)[None, :] * stride_n
    return tl.load(ptr + at, mask=inside, other=other).to(tl.float32), inside


@triton.jit
def square_sum(
    h_ptr, rows, valid, start, stop, stride_b, stride_d, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Return the sums of squares over columns ``[start, stop)`` of the features' rows, ``(ROWS,)`` float32."""
    total = tl.zeros(rows.shape, tl.float32)
    for first in range(start, stop, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        at = (rows * multiple(stride_b, ALIGN))[:, None] + d.to(tl.int64)[None, :] * stride_d
        h = tl.load(h_ptr + at, mask=valid[:, None] & (d < stop)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(h * h, 1)
    return total


@triton.jit
def features_factor(square, N, BIAS: tl.constexpr, MEAN: tl.constexpr):
    """Return ``||h||^2 + bias``, divided by N^2 if the loss is averaged over classes."""
    if BIAS:
        square = square + 1.0
    if MEAN:
        n = tl.zeros_like(square) + N
        square = square / n / n
    return square


@triton.jit(do_not_specialize=["B", "N"])
def contrast_rows_kernel(
    h_ptr, z_ptr, out_ptr, B, N, D, stride_hb, stride_hd, stride_zb, stride_zn,
    LOSS: tl.constexpr, BIAS: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ALIGN_H: tl.constexpr, ALIGN_Z: tl.constexpr,
):  # fmt: skip
    """Grid ``(cdiv(B, ROWS),)``: rows of up to ``BLOCK_N`` logits."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < B
    z, inside = load_rows(z_ptr, rows, valid, N, stride_zb, stride_zn, BLOCK_N, ALIGN_Z, float("-inf"))
    square = square_sum(h_ptr, rows, valid, 0, D, stride_hb, stride_hd, BLOCK_D, ALIGN_H)
    factor = features_factor(square, N, BIAS, MEAN)
    m, r = two_largest(z)
    top = z > r[:, None]  # none on a tie
    if LOSS == "cross_entropy":
        r = tl.where(r > float("-inf"), r, m)  # a single logit
        f = tl.exp(tl.where(top, 0.0, z - r[:, None]))
        s1, s2 = tl.sum(f, 1) - 1.0, tl.sum(f * f, 1) - 1.0
        rho, _, _ = exp_difference(r, m)
        a = 1.0 + rho * s1
        p = rho / a
        predicted = p * (s1 * s1 + s2) * p
        value = (predicted + 2.0 / a)[:, None] - (2.0 * p)[:, None] * f
    elif LOSS == "bce":
        s = sigmoid(tl.where(top, r[:, None], z))
        own, less, twice = sigmoid(m), sigmoid(-m), sigmoid(r)
        predicted = less * less + (tl.sum(s * s, 1) - twice * twice)
        value = (predicted + 2.0 * own)[:, None] - 2.0 * s
    else:
        others = tl.where(top, 0.0, z)
        s2 = tl.sum(tl.where(inside, others * others, 0.0), 1)
        s2 -= tl.where((m == r) & (tl.abs(m) < float("inf")), m * m, 0.0)
        predicted = 4.0 * ((m - 1.0) * (m - 1.0) + s2)
        value = (predicted + 8.0 * m)[:, None] - 8.0 * z
        value = tl.where(predicted[:, None] < float("inf"), value, predicted[:, None])
    value = factor[:, None] * tl.where(top, predicted[:, None], value)
    at = (rows * multiple(N, ALIGN_Z))[:, None] + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + at, value, mask=inside)
