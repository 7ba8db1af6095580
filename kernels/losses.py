# ruff: noqa: RET505, SIM108 - choices between constants at compile time: a branch not taken is not compiled
"""Everything that the kernels know about a loss, as device functions with a constant ``LOSS``.

A new loss is a branch in each of them: its sums over a row (``empty_moments``, ``reduce_moments``), the squared norm of
a contrast from these (``contrast_coefficients``, ``rest_value``), statistics over all contrasts
(``contrast_statistics``) and an entry of delta for a fixed target (``delta_entry``; cross-entropy has a sweep in
``target``).

For confident rows ``p_k - 1`` and ``|p|^2 - 2 p_k + 1`` cancel to nothing, so sums leave a row's maximum out. A row's
moments are a tuple: ``top`` and ``second``, the two largest logits (equal on a tie), then, with
``f_j = exp(z_j - second)``, ``g_j = 1 - exp(z_j - top)`` and every sum over all entries but one maximum,

    =============  ===================================  ======================================
    loss           always                               with ``STATS``
    =============  ===================================  ======================================
    cross_entropy  sum f^2, sum f                       min z
    bce, mse       sum u^2                              sum f, sum f u, sum u, min z
    brier          sum f^2, sum f, sum f^3, sum f^4,     (none)
                   sum f g, sum f^2 g, sum f^2 g^2
    =============  ===================================  ======================================

with ``u = sigmoid(z)`` for bce and ``u = z`` for mse. Scaled by the second maximum, no sum underflows; for the
logarithm of bce (``LOG``) the sum of squares is scaled by ``sigmoid(second)^2``. Where neither a logarithm nor
``STATS`` nor brier needs it, ``second`` is ``top``: a square that underflows then does not show in the result.

A single logit is a row with ``top = z``, ``second = -inf`` and empty sums, so one associative reduction serves tiles
of logits and partial moments alike. Its identity is the empty row: ``top = second = -inf``, zero sums, ``min z = inf``.
"""

import triton
import triton.language as tl

from .numerics import exp, finite, log_sigmoid, margin, one_minus, sigmoid

# Planes of partial moments that leave the chip: nine at most, and a partial sum of squares of the features.
PLANES = 10


@triton.jit
def empty_moments(ROWS: tl.constexpr, LOSS: tl.constexpr, STATS: tl.constexpr):
    """Return moments ``[R]`` of rows without entries: the identity of ``reduce_moments``."""
    zero = tl.zeros([ROWS], tl.float32)
    lowest = zero + float("-inf")
    moments = (lowest, lowest, zero)
    if ((LOSS == "cross_entropy") or (LOSS == "brier")) or STATS:
        moments += (zero,)
    if LOSS == "brier":
        moments += (zero, zero, zero, zero, zero)
    elif STATS:
        if LOSS != "cross_entropy":
            moments += (zero, zero)
        moments += (zero + float("inf"),)
    return moments


@triton.jit
def reduce_moments(
    parts, valid, LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """Return the moments of each row of a tile ``[R, C]`` over its axis 1; entries outside ``valid`` do not exist.

    There, logits are minus infinity. With ``NESTED``, ``parts`` are moments of parts of a row (the empty row's outside
    ``valid``), else ``(logits,)``.
    """
    lowest = float("-inf")
    z = parts[0]
    top = tl.max(z, 1)
    is_top = z == top[:, None]
    if LOSS == "mse":
        is_top = is_top & valid
    rest = is_top == 0
    copies = tl.sum(is_top.to(tl.float32), 1) - 1.0
    if NESTED:
        # An empty row adds nothing; a real maximum of minus infinity adds nothing that is not in its sums.
        rest = rest & (z > lowest)
    elif LOSS == "mse":
        # The other losses' terms are 0, or as good as that.
        rest = rest & valid
    if (LOG or STATS) or (LOSS == "brier"):
        below = tl.where(is_top, parts[1] if NESTED else lowest, z)
        second = tl.where(copies > 0.0, top, tl.max(below, 1))
    else:
        second = top
    base = finite(second)[:, None]
    tie = tl.where(second > lowest, copies, 0.0)

    SOFTMAX: tl.constexpr = (LOSS == "cross_entropy") or (LOSS == "brier")
    if SOFTMAX or STATS:
        f = tl.where(rest, exp(z - base), 0.0)
        mass = tl.sum(f, 1) + tie
        if NESTED:
            scale = exp(parts[1] - base)
            mass += tl.sum(scale * parts[3], 1)
    if SOFTMAX:
        square = tl.sum(f * f, 1) + tie
        if NESTED:
            square += tl.sum(scale * scale * parts[2], 1)
    else:
        if LOSS == "bce":
            u = sigmoid(z)
            u_top = sigmoid(top)
        else:
            u = z
            u_top = top
        if (LOSS == "bce") and LOG:
            log_base = finite(log_sigmoid(second))[:, None]
            square = tl.sum(tl.where(rest, exp(2.0 * (log_sigmoid(z) - log_base)), 0.0), 1) + tie
            if NESTED:
                square += tl.sum(exp(2.0 * (log_sigmoid(parts[1]) - log_base)) * parts[2], 1)
        else:
            square = tl.sum(tl.where(rest, u * u, 0.0), 1)
            square += tl.where(copies > 0.0, copies * u_top * u_top, 0.0)
            if NESTED:
                square += tl.sum(parts[2], 1)
            if (LOSS == "mse") and (not NESTED):
                square = tl.where((top == lowest) & (copies >= 0.0), float("inf"), square)

    moments = (top, second, square)
    if SOFTMAX or STATS:
        moments += (mass,)
    if LOSS == "brier":
        f2 = f * f
        cube = tl.sum(f2 * f, 1) + tie
        fourth = tl.sum(f2 * f2, 1) + tie
        x = z - finite(top)[:, None]
        e = exp(x)
        h = one_minus(x, e)
        g = tl.where(rest, h, 0.0)
        fg = tl.sum(f * g, 1)
        ffg = tl.sum(f2 * g, 1)
        ffgg = tl.sum(f2 * g * g, 1)
        if NESTED:
            # Against a larger maximum 1 - e becomes h + e (1 - e_old): only positive terms.
            _, _, square_b, mass_b, cube_b, fourth_b, fg_b, ffg_b, ffgg_b = parts
            s2 = scale * scale
            cube += tl.sum(s2 * scale * cube_b, 1)
            fourth += tl.sum(s2 * s2 * fourth_b, 1)
            fg += tl.sum(scale * (h * mass_b + e * fg_b), 1)
            ffg += tl.sum(s2 * (h * square_b + e * ffg_b), 1)
            ffgg += tl.sum(s2 * (h * h * square_b + 2.0 * e * h * ffg_b + e * e * ffgg_b), 1)
        moments += (cube, fourth, fg, ffg, ffgg)
    elif STATS:
        if not SOFTMAX:
            fu = tl.sum(tl.where(rest, f * u, 0.0), 1) + tl.where(tie > 0.0, tie * u_top, 0.0)
            total = tl.sum(tl.where(rest, u, 0.0), 1) + tl.where(copies > 0.0, copies * u_top, 0.0)
            if NESTED:
                fu += tl.sum(scale * parts[4], 1)
                total += tl.sum(parts[5], 1)
            moments += (fu, total)
        moments += (tl.min(parts[-1] if NESTED else tl.where(valid, z, float("inf")), 1),)
    return moments


@triton.jit
def contrast_coefficients(moments, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Return each row's largest logit, the value of its contrast, and what ``rest_value`` takes for other contrasts.

    For these the squares cancel exactly and leave a polynomial in ``exp(z_k - second)``, ``sigmoid(z_k)`` or ``z_k``.
    """
    top, second, square = moments[0], moments[1], moments[2]
    if (LOSS == "cross_entropy") or (LOSS == "brier"):
        base = finite(second)
        mass = moments[3]
        rho, r, err = margin(top, second)
        a = 1.0 + rho * mass
        inv = 1.0 / a
        p_rest = rho * inv
        square_top = inv * inv + p_rest * p_rest * square
        tail = mass * mass + square
        if LOSS == "cross_entropy":
            if LOG:
                peak = 2.0 * r + (2.0 * err + tl.log(tail) - 2.0 * tl.log(a)) + 0.0 * rho
            else:
                # In this order, here and below, nothing leaves float32's range before the product does.
                peak = p_rest * tail * p_rest
            return top, peak, base, square_top + 1.0, 2.0 * p_rest
        else:
            _, _, _, _, cube, fourth, fg, ffg, ffgg = moments
            inv2 = inv * inv
            w1 = p_rest * inv2 * ffg
            # Everything is divided by exp(second - top)^2, so that the logarithm holds at any margin.
            shift = fg * inv2 - w1 / square_top
            constant = ffgg * inv2 * inv2 - w1 * w1 / square_top
            constant = tl.where(constant < 0.0, 0.0, constant)
            inner = fourth + fg * inv * (2.0 * cube + fg * inv * square) + tail * tail * inv2
            if LOG:
                scale = 2.0 * r + 2.0 * err + 1.3862943611198906
                peak = 2.0 * scale - 1.3862943611198906 + tl.log(inner) - 4.0 * tl.log(a) + 0.0 * rho
            else:
                scale = 2.0 * rho
                twice = 2.0 * p_rest * p_rest
                peak = twice * inner * twice
            return top, peak, base, square_top, shift, constant, inv, scale, p_rest
    elif LOSS == "bce":
        s = sigmoid(top)
        if LOG:
            log_second = log_sigmoid(second)
            constant = s * s + exp(2.0 * finite(log_second)) * square + 1.0
            x = 2.0 * log_sigmoid(-top)
            y = 2.0 * log_second + tl.log(square)
            hi = tl.where(x > y, x, y)
            lo = tl.where(x > y, y, x)
            peak = hi + tl.log(1.0 + exp(lo - finite(hi)))
        else:
            constant = s * s + square + 1.0
            s = sigmoid(-top)
            peak = s * s + square
        return top, peak, constant
    else:
        peak = 4.0 * ((top - 1.0) * (top - 1.0) + square)
        if LOG:
            peak = tl.log(peak)
        return top, peak, 4.0 * (top * top + square + 1.0)


@triton.jit
def rest_value(z, coefficients, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Return ``||delta^(k)||^2`` (or its logarithm) of contrasts whose logit ``z`` is not the maximal one."""
    if LOSS == "cross_entropy":
        _, _, base, constant, slope = coefficients
        v = constant - slope * exp(z - base)
    elif LOSS == "bce":
        v = coefficients[2] - 2.0 * sigmoid(z)
    elif LOSS == "mse":
        v = coefficients[2] - 8.0 * z
    else:
        _, _, base, square_top, shift, constant, inv, scale, p_rest = coefficients
        f = exp(z - base)
        q = f * inv
        d = shift + q
        v = square_top * d * d + constant + q * q * (1.0 + 2.0 * square_top - 4.0 * (f * p_rest))
        if LOG:
            v = tl.log(v) + scale
        else:
            v = v * (scale * scale)
    if LOG and (LOSS != "brier"):
        v = tl.log(v)
    return v


@triton.jit
def contrast_statistics(moments, N, LOSS: tl.constexpr):
    """Return minimum, maximum, mean, softmax expectation and the predicted class' value over each row's contrasts.

    Not for brier, a cubic of the probability: its extremes are not at those of the logits.
    """
    coefficients = contrast_coefficients(moments, LOSS, False)
    top, second, square, mass = moments[0], moments[1], moments[2], moments[3]
    peak = coefficients[1]
    others = tl.zeros_like(top) + (N - 1)
    rho, _, _ = margin(top, second)
    if LOSS == "cross_entropy":
        _, _, _, constant, slope = coefficients
        total = others * constant - slope * mass
        weighted = constant * mass - slope * square
    else:
        slope = 2.0 if LOSS == "bce" else 8.0
        total = others * coefficients[2] - slope * moments[5]
        weighted = coefficients[2] * mass - slope * moments[4]
    v = rest_value(second, coefficients, LOSS, False)
    low = tl.where((others > 0.0) & (v < peak), v, peak)
    v = rest_value(moments[-1], coefficients, LOSS, False)
    high = tl.where((others > 0.0) & (v > peak), v, peak)
    mean = tl.where(others > 0.0, peak + total, peak) / (others + 1.0)
    expected = (peak + tl.where(others > 0.0, rho * weighted, 0.0)) * (1.0 / (1.0 + rho * mass))
    return low, high, mean, expected, peak


@triton.jit
def delta_entry(z, y, LOSS: tl.constexpr):
    """Return ``delta_j``, for losses where it depends only on ``z_j`` and ``y_j``."""
    if LOSS == "bce":
        return tl.where(z > 0.0, (1.0 - y) - sigmoid(-z), sigmoid(z) - y)
    else:
        return 2.0 * (z - y)
