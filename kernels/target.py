# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# ruff: noqa: SIM108 - choices between constants at compile time read better as statements
"""Squared norms of the last layer's gradients for one fixed target per sample.

    out[b] = ||delta(z_b, y_b)||^2 (||h_b||^2 + bias)          float32, or its logarithm

``KIND`` names the target: ``ones`` and ``uniform`` (y = 1 and y = 1/N for every class), ``predicted`` and ``indices``
(one-hot), ``soft`` (any ``(B, N)``). A program owns ``ROWS`` rows and sweeps them up to four times; rows that fit one
block come from the cache after the first.

Every difference is formed where it does not cancel: against the maximum for softmax losses, against
``1 - sigmoid(-z)`` for positive logits.
"""

import triton
import triton.language as tl

from .contrast import features_factor, square_sum
from .moments import (
    contrast_coefficients,
    contrast_value,
    empty_moments,
    exp,
    finite,
    log_sigmoid,
    margin,
    merge_moments,
    one_minus,
    sigmoid,
    tile_moments,
)


@triton.jit
def load_block(ptrs, stride, n, N, valid, BLOCK_N: tl.constexpr, other: tl.constexpr):
    """Columns ``[n, n + BLOCK_N)`` of the rows at ``ptrs`` as float32, and which of them exist."""
    cols = n + tl.arange(0, BLOCK_N)
    inside = valid[:, None] & (cols < N)[None, :]
    block = tl.load(ptrs[:, None] + cols.to(tl.int64)[None, :] * stride, mask=inside, other=other)
    return block.to(tl.float32), inside


@triton.jit(do_not_specialize=["B", "N_units"])
def target_sqnorm_kernel(
    h_ptr, z_ptr, y_ptr, out_ptr, B, N_units, D, stride_hb, stride_hd, stride_zb, stride_zn, stride_yb, stride_yn,
    LOSS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr, ALIGN_Z: tl.constexpr, ALIGN_Y: tl.constexpr, ALIGN_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(cdiv(B, ROWS),)``. An index outside ``[0, N)`` gives NaN."""
    N = N_units * ALIGN_N
    lowest = float("-inf")
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < B
    square = square_sum(h_ptr + rows * stride_hb * ALIGN_H, valid, 0, D, stride_hd, ROWS, BLOCK_D)
    factor = features_factor(square, N, BIAS, LOG, MEAN)
    zs = z_ptr + rows * stride_zb * ALIGN_Z
    ys = y_ptr + rows * stride_yb * ALIGN_Y
    size = tl.zeros([ROWS], tl.float32) + N
    value = tl.zeros([ROWS], tl.float32)
    in_log = False

    MOMENTS: tl.constexpr = ((KIND == "predicted") or (KIND == "indices")) or (
        (LOSS == "cross_entropy") or (LOSS == "brier")
    )
    if MOMENTS:
        m, m2, a1, a2, a3, a4, a5, a6, a7 = empty_moments(ROWS, LOSS, False)
        for n in range(0, N, BLOCK_N):
            z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, lowest)
            n1, n2, b1, b2, b3, b4, b5, b6, b7 = tile_moments(z, inside, LOSS, LOG, False)
            m, m2, a1, a2, a3, a4, a5, a6, a7 = merge_moments(
                m, m2, a1, a2, a3, a4, a5, a6, a7, n1, n2, b1, b2, b3, b4, b5, b6, b7, LOSS, LOG, False
            )
        m, base, top, c0, c1, c2, c3, c4, c5 = contrast_coefficients(
            m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS, LOG
        )
        if (LOSS == "cross_entropy") or (LOSS == "brier"):
            rho, _gap, _error = margin(m, m2)
            rho = tl.where(tl.abs(m) < float("inf"), rho, float("nan"))
            tail = rho * a1
            a = 1.0 + tail

    if KIND == "predicted":
        value = top
        in_log = LOG
    elif KIND == "indices":
        k = tl.load(ys, mask=valid, other=0).to(tl.int64)
        known = (k >= 0) & (k < N)
        z_k = tl.load(zs + tl.where(known, k, 0) * stride_zn, mask=valid, other=0.0).to(tl.float32)
        value = contrast_value(z_k, m, base, top, c0, c1, c2, c3, c4, c5, LOSS, LOG)
        value = tl.where(known, value, float("nan"))
        in_log = LOG
    elif LOSS == "cross_entropy":
        if KIND == "soft":
            rest = tl.zeros([ROWS], tl.float32)
            tops = tl.zeros([ROWS], tl.float32)
            for n in range(0, N, BLOCK_N):
                z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, lowest)
                y, _inside = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
                is_top = z == m[:, None]
                rest += tl.sum(tl.where(is_top, 0.0, y), 1)
                tops += tl.sum(tl.where(is_top, y, 0.0), 1)
            total = rest + tops
            for n in range(0, N, BLOCK_N):
                z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, lowest)
                y, _inside = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
                p = exp(z - base[:, None]) * (rho / a)[:, None]
                other = total[:, None] * p - y
                # p_top - 1 is minus the other probabilities, and y_top - sum y minus the other targets.
                at_top = (rest[:, None] + (tops[:, None] - y)) - (total * tail / a)[:, None]
                delta = tl.where(inside, tl.where(z == m[:, None], at_top, other), 0.0)
                value += tl.sum(delta * delta, 1)
        else:
            # N p_j - 1 is the deviation of e_j = exp(z_j - m) from its mean, over that mean.
            mean = a / size
            mean_g = tl.zeros([ROWS], tl.float32)
            for n in range(0, N, BLOCK_N):
                z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, lowest)
                x = z - finite(m)[:, None]
                mean_g += tl.sum(tl.where(inside, one_minus(x, exp(x)), 0.0), 1)
            mean_g = mean_g / size
            for n in range(0, N, BLOCK_N):
                z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, lowest)
                x = z - finite(m)[:, None]
                e = exp(x)
                deviation = tl.where(
                    (mean > 0.5)[:, None], mean_g[:, None] - one_minus(x, e), e - mean[:, None]
                )
                deviation = tl.where(inside, deviation, 0.0)
                value += tl.sum(deviation * deviation, 1)
            value = value / mean / mean
            if KIND == "uniform":
                value = value / size / size
    elif LOSS == "brier":
        if KIND == "soft":
            reference = tl.zeros([ROWS], tl.float32)
            copies = tl.zeros([ROWS], tl.float32)
            for n in range(0, N, BLOCK_N):
                z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, lowest)
                y, _inside = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
                is_top = inside & (z == m[:, None])
                reference += tl.sum(tl.where(is_top, y, 0.0), 1)
                copies += tl.sum(is_top.to(tl.float32), 1)
            reference = reference / copies
            centre = tl.zeros([ROWS], tl.float32)
            for n in range(0, N, BLOCK_N):
                p, h = brier_terms(
                    zs, ys, stride_zn, stride_yn, n, N, valid, m, base, rho, tail, a, reference, BLOCK_N
                )  # fmt: skip
                centre += tl.sum(p * h, 1)
            for n in range(0, N, BLOCK_N):
                p, h = brier_terms(
                    zs, ys, stride_zn, stride_yn, n, N, valid, m, base, rho, tail, a, reference, BLOCK_N
                )  # fmt: skip
                delta = 2.0 * p * (centre[:, None] - h)
                value += tl.sum(delta * delta, 1)
        else:
            # A constant target drops out: what is left is the contrast's polynomial at p_k = 0.
            value = c0 * c1 * c1 + c2
            value = tl.log(value) + c4 if LOG else value * (c4 * c4)
            in_log = LOG
    elif ((LOSS == "bce") and (KIND == "ones")) and LOG:
        low = tl.zeros([ROWS], tl.float32) + float("inf")
        for n in range(0, N, BLOCK_N):
            z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, 0.0)
            low = tl.minimum(low, tl.min(tl.where(inside, z, float("inf")), 1))
        scale = finite(log_sigmoid(-low))
        for n in range(0, N, BLOCK_N):
            z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, 0.0)
            value += tl.sum(tl.where(inside, exp(2.0 * (log_sigmoid(-z) - scale[:, None])), 0.0), 1)
        value = 2.0 * scale + tl.log(value)
        in_log = True
    else:
        for n in range(0, N, BLOCK_N):
            z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, 0.0)
            if KIND == "soft":
                y, _inside = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
            elif KIND == "ones":
                y = tl.zeros_like(z) + 1.0
            else:
                y = tl.zeros_like(z) + (1.0 / size)[:, None]
            if LOSS == "bce":
                delta = tl.where(z > 0.0, (1.0 - y) - sigmoid(-z), sigmoid(z) - y)
            else:
                delta = 2.0 * (z - y)
            delta = tl.where(inside, delta, 0.0)
            value += tl.sum(delta * delta, 1)

    if LOG:
        if not in_log:
            value = tl.log(value)
        value += factor
    else:
        value *= factor
    tl.store(out_ptr + rows, value, mask=valid)


@triton.jit
def brier_terms(
    zs, ys, stride_zn, stride_yn, n, N, valid, m, base, rho, tail, a, reference, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``p_j`` and ``h_j = (p_i - y_i) - (p_j - y_j)`` of a block, i the maximum; ``p_j = 0`` outside.

    delta_j = 2 p_j (sum_l p_l h_l - h_j). For a one-hot target at i the two differences nearly cancel, so that
    ``(p_i - p_j) - 1 = -(sum over the others + p_j)`` takes the place of the first.
    """
    z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, float("-inf"))
    y, _inside = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
    x = z - finite(m)[:, None]
    e = exp(x)
    inv = (1.0 / a)[:, None]
    is_top = z == m[:, None]
    drop = reference[:, None] - y
    near = one_minus(x, e) * inv - drop
    far = (1.0 - drop) - (tail[:, None] + e) * inv
    h = tl.where(is_top, -drop, tl.where(drop > 0.5, far, near))
    p = tl.where(is_top, inv, exp(z - base[:, None]) * (rho[:, None] * inv))
    return tl.where(inside, p, 0.0), tl.where(inside, h, 0.0)
