"""Squared norms of the last layer's gradients for one fixed target per sample.

    out[b] = ||delta(z_b, y_b)||^2 (||h_b||^2 + bias)          float32, or its logarithm

``KIND`` names the target: ``ones`` and ``uniform`` (y = 1 and y = 1/N for every class), ``predicted`` and ``indices``
(one-hot). A program owns ``ROWS`` rows and sweeps them up to three times, the second and third time from the cache.
Soft targets, which differ from class to class, have only an eager form.
"""

import triton
import triton.language as tl

from .contrast import features_factor, square_sum
from .losses import contrast_coefficients, delta_entry, rest_value
from .moments import load_block, sweep_moments
from .numerics import exp, finite, log_sigmoid, margin, one_minus


@triton.jit
def cross_entropy_constant(
    zs, stride_zn, N, valid, top, tail, MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return the sum of ``(N p_j - 1)^2``, over N^2 with ``MEAN``.

    ``N p_j - 1`` is the deviation of ``e_j = exp(z_j - top)`` from its mean, over that mean. ``tail`` is the sum of e
    without one maximum. Where most e are near 1, the differences to 1 are what does not cancel.
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
def log_sum_for_ones(zs, stride_zn, N, valid, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
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
def sum_of_squares(
    zs, stride_zn, N, valid, KIND: tl.constexpr, LOSS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return the sum of ``delta_j^2``, for losses where ``delta_j`` depends only on ``z_j`` and the target."""
    label = 1.0 if KIND == "ones" else 1.0 / (tl.zeros([ROWS, 1], tl.float32) + N)
    value = tl.zeros([ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        z, inside = load_block(zs, stride_zn, n, N, valid, BLOCK_N, 0.0)
        delta = tl.where(inside, delta_entry(z, label, LOSS), 0.0)
        value += tl.sum(delta * delta, 1)
    return value


@triton.jit
def target_value(
    zs, stride_zn, N, valid, moments,
    LOSS: tl.constexpr, KIND: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return ``||delta||^2`` (or its logarithm) of rows at pointers, for the targets ``ones`` and ``uniform``."""
    IN_LOG: tl.constexpr = (LOSS == "brier") or ((LOSS == "bce") and (KIND == "ones"))
    if LOSS == "cross_entropy":
        rho, _, _ = margin(moments[0], moments[1])
        tail = rho * moments[3]
        value = cross_entropy_constant(zs, stride_zn, N, valid, moments[0], tail, KIND == "uniform", ROWS, BLOCK_N)
    elif LOSS == "brier":
        # A constant target drops out: what is left is the contrast's polynomial at p_k = 0.
        _, _, _, square_top, shift, constant, _, scale, _ = contrast_coefficients(moments, LOSS, LOG)
        value = square_top * shift * shift + constant
        value = tl.log(value) + scale if LOG else value * (scale * scale)
    elif IN_LOG and LOG:
        value = log_sum_for_ones(zs, stride_zn, N, valid, ROWS, BLOCK_N)
    else:
        value = sum_of_squares(zs, stride_zn, N, valid, KIND, LOSS, ROWS, BLOCK_N)
    return tl.log(value) if LOG and (not IN_LOG) else value


@triton.jit(do_not_specialize=["B", "N_units"])
def target_sqnorm_kernel(
    h_ptr, z_ptr, y_ptr, out_ptr, B, N_units, D, stride_hb, stride_hd, stride_zb, stride_zn, stride_y,
    LOSS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr, MEAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN_H: tl.constexpr, ALIGN_Z: tl.constexpr, ALIGN_N: tl.constexpr,
):  # fmt: skip
    """Grid ``(cdiv(B, ROWS),)``. An index outside ``[0, N)`` gives NaN."""
    N = N_units * ALIGN_N
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < B
    features = square_sum(h_ptr + rows * stride_hb * ALIGN_H, valid, 0, D, stride_hd, ROWS, BLOCK_D)
    factor = features_factor(features, N, BIAS, LOG, MEAN)
    zs = z_ptr + rows * stride_zb * ALIGN_Z
    # The compiler drops this sweep where nothing reads its moments.
    moments = sweep_moments(zs, stride_zn, 0, N, valid, LOSS, LOG, ROWS, BLOCK_N)
    if (KIND == "predicted") or (KIND == "indices"):
        coefficients = contrast_coefficients(moments, LOSS, LOG)
        value = coefficients[1]
        if KIND == "indices":
            k = tl.load(y_ptr + rows * stride_y, mask=valid, other=0).to(tl.int64)
            known = (k >= 0) & (k < N)
            z = tl.load(zs + tl.where(known, k, 0) * stride_zn, mask=valid, other=0.0).to(tl.float32)
            value = tl.where(z == coefficients[0], value, rest_value(z, coefficients, LOSS, LOG))
            value = tl.where(known, value, float("nan"))
    else:
        value = target_value(zs, stride_zn, N, valid, moments, LOSS, KIND, LOG, ROWS, BLOCK_N)
    value = value + factor if LOG else value * factor
    tl.store(out_ptr + rows, value, mask=valid)
