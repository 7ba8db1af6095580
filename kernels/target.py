"""Squared norms of the last layer's gradients for one fixed target per sample.

    out[b] = ||delta(z_b, y_b)||^2 (||h_b||^2 + bias)          float32, or its logarithm

``KIND`` names the target: ``ones`` and ``uniform`` (y = 1 and y = 1/N for every class), ``predicted`` and ``indices``
(one-hot), ``soft`` (any ``(B, N)``). A program owns ``ROWS`` rows and sweeps them up to four times; rows that fit one
block come from the cache after the first.

Every difference is formed where it does not cancel: against the maximum for softmax losses, against
``1 - sigmoid(-z)`` for positive logits. ``top`` and ``base`` are a row's two largest logits, ``tail`` the other
exponentials over the largest, ``rho = exp(base - top)``: the softmax is ``exp(z - base) rho / (1 + tail)``.
"""

import triton
import triton.language as tl

from .contrast import features_factor, square_sum
from .losses import contrast_coefficients, delta_entry, rest_value
from .moments import load_block, sweep_moments
from .numerics import exp, finite, log_sigmoid, margin, one_minus


@triton.jit
def cross_entropy_soft(
    zs, ys, stride_zn, stride_yn, N, valid, top, base, rho, tail, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return the sum of ``(p_j sum y - y_j)^2``."""
    a = 1.0 + tail
    size = tl.zeros([ROWS], tl.float32) + N
    rest = tl.zeros([ROWS], tl.float32)
    tops = tl.zeros([ROWS], tl.float32)
    # Sums of the differences to the maximum and to the first label, and the largest of the latter.
    gaps = tl.zeros([ROWS], tl.float32)
    steps = tl.zeros([ROWS], tl.float32)
    widest = tl.zeros([ROWS], tl.float32)
    first = tl.load(ys, mask=valid, other=0.0).to(tl.float32)
    for n in range(0, N, BLOCK_N):
        z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, float("-inf"))
        y, _ = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
        is_top = z == top[:, None]
        rest += tl.sum(tl.where(is_top, 0.0, y), 1)
        tops += tl.sum(tl.where(is_top, y, 0.0), 1)
        x = z - finite(top)[:, None]
        gaps += tl.sum(tl.where(inside, one_minus(x, exp(x)), 0.0), 1)
        step = tl.where(inside, y - first[:, None], 0.0)
        steps += tl.sum(step, 1)
        widest = tl.maximum(widest, tl.max(tl.abs(step), 1))
    total = rest + tops
    equal = (2.0 * a > size) & (size * widest < 0.4 * tl.abs(total))
    value = tl.zeros([ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, float("-inf"))
        y, _ = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
        p = exp(z - base[:, None]) * (rho / a)[:, None]
        other = total[:, None] * p - y
        # p_top - 1 is minus the other probabilities, and y_top - sum y minus the other targets.
        at_top = (rest[:, None] + (tops[:, None] - y)) - (total * tail / a)[:, None]
        at_top = tl.where((a > 2.0)[:, None], (total / a)[:, None] - y, at_top)
        delta = tl.where(z == top[:, None], at_top, other)
        # Where both logits and labels are nearly equal, differences do not cancel.
        x = z - finite(top)[:, None]
        centred = y * gaps[:, None] - total[:, None] * one_minus(x, exp(x))
        centred += steps[:, None] - size[:, None] * (y - first[:, None])
        delta = tl.where(inside, tl.where(equal[:, None], centred / a[:, None], delta), 0.0)
        value += tl.sum(delta * delta, 1)
    return value


@triton.jit
def cross_entropy_constant(
    zs, stride_zn, N, valid, top, tail, MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return the sum of ``(N p_j - 1)^2``, over N^2 with ``MEAN``.

    ``N p_j - 1`` is the deviation of ``e_j = exp(z_j - top)`` from its mean, over that mean.
    """
    size = tl.zeros([ROWS], tl.float32) + N
    mean = (1.0 + tail) / size
    mean_g = tl.zeros([ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, float("-inf"))
        x = z - finite(top)[:, None]
        mean_g += tl.sum(tl.where(inside, one_minus(x, exp(x)), 0.0), 1)
    mean_g = mean_g / size
    value = tl.zeros([ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, float("-inf"))
        x = z - finite(top)[:, None]
        e = exp(x)
        deviation = tl.where((mean > 0.5)[:, None], mean_g[:, None] - one_minus(x, e), e - mean[:, None])
        deviation = tl.where(inside, deviation, 0.0)
        value += tl.sum(deviation * deviation, 1)
    value = value / mean / mean
    return value / size / size if MEAN else value


@triton.jit
def brier_terms(
    zs, ys, stride_zn, stride_yn, n, N, valid, top, base, rho, tail, reference, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return ``p_j`` and ``h_j = (p_i - y_i) - (p_j - y_j)`` of a block, i the maximum; ``p_j = 0`` outside.

    delta_j = 2 p_j (sum_l p_l h_l - h_j). For a one-hot target at i the two differences nearly cancel, so h_j is
    computed from ``(p_i - p_j) - 1 = -(sum over the others + p_j)``.
    """
    z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, float("-inf"))
    y, _ = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
    x = z - finite(top)[:, None]
    e = exp(x)
    inv = (1.0 / (1.0 + tail))[:, None]
    is_top = z == top[:, None]
    drop = reference[:, None] - y
    near = one_minus(x, e) * inv - drop
    far = ((1.0 - reference)[:, None] + y) - (tail[:, None] + e) * inv
    h = tl.where(is_top, -drop, tl.where(drop > 0.5, far, near))
    p = tl.where(is_top, inv, exp(z - base[:, None]) * (rho[:, None] * inv))
    return tl.where(inside, p, 0.0), tl.where(inside, h, 0.0)


@triton.jit
def brier_soft(
    zs, ys, stride_zn, stride_yn, N, valid, top, base, rho, tail, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return the sum of ``(2 p_j (sum_l p_l h_l - h_j))^2``."""
    reference = tl.zeros([ROWS], tl.float32)
    copies = tl.zeros([ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, float("-inf"))
        y, _ = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
        is_top = inside & (z == top[:, None])
        reference += tl.sum(tl.where(is_top, y, 0.0), 1)
        copies += tl.sum(is_top.to(tl.float32), 1)
    reference = reference / copies
    centre = tl.zeros([ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        p, h = brier_terms(zs, ys, stride_zn, stride_yn, n, N, valid, top, base, rho, tail, reference, BLOCK_N)
        centre += tl.sum(p * h, 1)
    value = tl.zeros([ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        p, h = brier_terms(zs, ys, stride_zn, stride_yn, n, N, valid, top, base, rho, tail, reference, BLOCK_N)
        delta = 2.0 * p * (centre[:, None] - h)
        value += tl.sum(delta * delta, 1)
    return value


@triton.jit
def log_of_ones(zs, stride_zn, N, valid, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the logarithm of the sum of ``sigmoid(-z_j)^2``, computed in log space."""
    low = tl.zeros([ROWS], tl.float32) + float("inf")
    for n in range(0, N, BLOCK_N):
        z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, 0.0)
        low = tl.minimum(low, tl.min(tl.where(inside, z, float("inf")), 1))
    scale = finite(log_sigmoid(-low))
    value = tl.zeros([ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, 0.0)
        value += tl.sum(tl.where(inside, exp(2.0 * (log_sigmoid(-z) - scale[:, None])), 0.0), 1)
    return 2.0 * scale + tl.log(value)


@triton.jit
def elementwise(
    zs, ys, stride_zn, stride_yn, N, valid,
    KIND: tl.constexpr, LOSS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the sum of ``delta_j^2``, for losses where ``delta_j`` depends only on ``z_j`` and ``y_j``."""
    size = tl.zeros([ROWS], tl.float32) + N
    value = tl.zeros([ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, 0.0)
        if KIND == "soft":
            y, _ = load_block(ys, stride_yn, n, N, valid, BLOCK_N, 0.0)
        elif KIND == "ones":
            y = tl.zeros_like(z) + 1.0
        else:
            y = tl.zeros_like(z) + (1.0 / size)[:, None]
        delta = tl.where(inside, delta_entry(z, y, LOSS), 0.0)
        value += tl.sum(delta * delta, 1)
    return value


@triton.jit
def target_value(
    zs, ys, stride_zn, stride_yn, N, valid, moments,
    LOSS: tl.constexpr, KIND: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return ``||delta||^2`` (or its logarithm) of each row for the target ``KIND``: ``ones``, ``uniform`` or ``soft``.

    Rows are given as pointers.
    """
    top, second = moments[0], moments[1]
    if (LOSS == "cross_entropy") or (LOSS == "brier"):
        rho, _, _ = margin(top, second)
        tail = rho * moments[3]
    if (LOSS == "cross_entropy") and (KIND == "soft"):
        value = cross_entropy_soft(
            zs, ys, stride_zn, stride_yn, N, valid, top, finite(second), rho, tail, ROWS, BLOCK_N
        )
    elif LOSS == "cross_entropy":
        value = cross_entropy_constant(zs, stride_zn, N, valid, top, tail, KIND == "uniform", ROWS, BLOCK_N)
    elif (LOSS == "brier") and (KIND == "soft"):
        value = brier_soft(zs, ys, stride_zn, stride_yn, N, valid, top, finite(second), rho, tail, ROWS, BLOCK_N)
    elif LOSS == "brier":
        # A constant target drops out: what is left is the contrast's polynomial at p_k = 0.
        _, _, _, square_top, shift, constant, _, scale, _ = contrast_coefficients(moments, LOSS, LOG)
        value = square_top * shift * shift + constant
        value = tl.log(value) + scale if LOG else value * (scale * scale)
    elif ((LOSS == "bce") and (KIND == "ones")) and LOG:
        value = log_of_ones(zs, stride_zn, N, valid, ROWS, BLOCK_N)
    else:
        value = elementwise(zs, ys, stride_zn, stride_yn, N, valid, KIND, LOSS, ROWS, BLOCK_N)
    IN_LOG: tl.constexpr = ((LOSS == "brier") and (KIND != "soft")) or ((LOSS == "bce") and (KIND == "ones"))
    return tl.log(value) if LOG and (not IN_LOG) else value


@triton.jit(do_not_specialize=["B", "N_units"])
def target_sqnorm_kernel(
    h_ptr, z_ptr, y_ptr, out_ptr, B, N_units, D, stride_hb, stride_hd, stride_zb, stride_zn, stride_yb, stride_yn,
    LOSS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr, ALIGN_Z: tl.constexpr, ALIGN_Y: tl.constexpr, ALIGN_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(cdiv(B, ROWS),)``. An index outside ``[0, N)`` gives NaN."""
    N = N_units * ALIGN_N
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < B
    features = square_sum(h_ptr + rows * stride_hb * ALIGN_H, valid, 0, D, stride_hd, ROWS, BLOCK_D)
    factor = features_factor(features, N, BIAS, LOG, MEAN)
    zs = z_ptr + rows * stride_zb * ALIGN_Z
    ys = y_ptr + rows * stride_yb * ALIGN_Y
    # The compiler drops this sweep for losses that do not read its moments.
    moments = sweep_moments(zs, stride_zn, 0, N, valid, LOSS, LOG, ROWS, BLOCK_N)
    if (KIND == "predicted") or (KIND == "indices"):
        coefficients = contrast_coefficients(moments, LOSS, LOG)
        value = coefficients[1]
        if KIND == "indices":
            k = tl.load(ys, mask=valid, other=0).to(tl.int64)
            known = (k >= 0) & (k < N)
            z = tl.load(zs + tl.where(known, k, 0) * stride_zn, mask=valid, other=0.0).to(tl.float32)
            value = tl.where(z == coefficients[0], value, rest_value(z, coefficients, LOSS, LOG))
            value = tl.where(known, value, float("nan"))
    else:
        value = target_value(zs, ys, stride_zn, stride_yn, N, valid, moments, LOSS, KIND, LOG, ROWS, BLOCK_N)
    value = value + factor if LOG else value * factor
    tl.store(out_ptr + rows, value, mask=valid)
