"""Squared norms of the last layer's gradients for one fixed target per sample.

    out[b] = ||delta(z_b, y_b)||^2 (||h_b||^2 + bias)          float32, or its logarithm

``KIND`` names the target: ``ones`` and ``uniform`` (y = 1 and y = 1/N for every class), ``predicted`` and ``indices``
(one-hot), ``soft`` (any ``(B, N)``). A program owns ``ROWS`` rows and sweeps them up to four times; rows that fit one
block come from the cache after the first.
"""

import triton
import triton.language as tl

from .contrast import features_factor, square_sum
from .losses import contrast_coefficients, rest_value
from .moments import sweep_moments
from .sweeps import target_value


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
    # A sweep of which a loss reads nothing is dropped by the compiler.
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
