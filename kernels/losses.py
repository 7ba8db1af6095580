# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# ruff: noqa: SIM108 - choices between constants at compile time read better as statements
"""Everything the kernels know of a loss, as device functions with a constant ``LOSS``.

A new loss is a branch in each of them: which sums over a row it needs (``reduce_moments``, and ``store_moments`` with
``load_moments`` for those that leave the chip), the squared norm of a contrast from these sums
(``contrast_coefficients``, ``rest_value``), statistics over all contrasts (``contrast_statistics``) and the squared
norm for a fixed target (``target_value``). Outside the device code a loss is named in ``fastgrad.losses``, which
defines it, in ``fastgrad.ops.heuristics``, where a tile must fit the registers, and in the launcher of the
statistics, which sweeps twice where the extremes do not follow the logits.

Confident rows are the common case, and there ``p_k - 1`` and ``|p|^2 - 2 p_k + 1`` cancel to nothing. So a row is
summarised by sums that leave its maximum out. With ``f_j = exp(z_j - second)``, ``g_j = 1 - exp(z_j - top)`` and every
sum over all entries but one maximum, the nine moments are

    =========  ====================  =========  ========================================
    moment     cross_entropy, brier  bce, mse   with ``STATS`` (not brier)
    =========  ====================  =========  ========================================
    top        the largest logit
    second     the second largest logit, equal to the largest on a tie
    square     sum f^2               sum u^2    as without
    mass       sum f                 0          sum f
    x1         brier: sum f^3        0          bce, mse: sum f u
    x2         brier: sum f^4        0          bce, mse: sum u
    x3         brier: sum f g        0          min z
    x4, x5     brier: sum f^2 g and sum f^2 g^2
    =========  ====================  =========  ========================================

with ``u = sigmoid(z)`` for bce and ``u = z`` for mse. Scaling by the second maximum keeps every sum away from
underflow at any margin; for the logarithm of bce (``LOG``) ``square`` is scaled by ``sigmoid(second)^2`` for the same
reason.

A single logit is a row with ``top = z``, ``second = -inf`` and empty sums, so one associative reduction serves tiles
of logits and partial moments alike. The empty row (``top = second = -inf``, zero sums, ``min z = inf``) is its
identity. The moments are nine arguments and not a tuple because Triton compiles tuples from 3.3 on.
"""

import triton
import triton.language as tl

from .numerics import exp, finite, log_sigmoid, margin, one_minus, sigmoid
from .sweeps import brier_soft, cross_entropy_constant, cross_entropy_soft, elementwise, log_of_ones

# Partial moments that leave the chip lie in so many planes, one for each and one for a partial sum of squares.
PLANES = tl.constexpr(10)


@triton.jit
def reduce_moments(
    z, second, square, mass, x1, x2, x3, x4, x5, valid,
    LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Moments of each row of a tile ``[R, C]`` over its axis 1; entries outside ``valid`` do not exist.

    With ``NESTED`` the tile holds partial moments (invalid entries must be the empty row), ``z`` their maxima; without
    it ``z`` holds logits and the other operands are ignored.
    """
    lowest = float("-inf")
    z = tl.where(valid, z, lowest)
    top = tl.max(z, 1)
    is_top = valid & (z == top[:, None])
    copies = tl.sum(is_top.to(tl.float32), 1) - 1.0
    if NESTED:
        below = tl.where(is_top, second, z)
        # An empty row adds nothing; a real maximum of minus infinity adds nothing that is not in its sums.
        rest = valid & (is_top == 0) & (z > lowest)
    else:
        below = tl.where(is_top, lowest, z)
        rest = valid & (is_top == 0)
    top2 = tl.where(copies > 0.0, top, tl.max(below, 1))
    base = finite(top2)[:, None]
    tie = tl.where(top2 > lowest, copies, 0.0)

    none = tl.zeros_like(top)
    squares, masses, y1, y2, y3, y4, y5 = none, none, none, none, none, none, none
    SOFTMAX: tl.constexpr = (LOSS == "cross_entropy") or (LOSS == "brier")
    if SOFTMAX or STATS:
        f = tl.where(rest, exp(z - base), 0.0)
        masses = tl.sum(f, 1) + tie
        if NESTED:
            scale = exp(second - base)
            masses += tl.sum(scale * mass, 1)
    if SOFTMAX:
        squares = tl.sum(f * f, 1) + tie
        if NESTED:
            squares += tl.sum(scale * scale * square, 1)

    if LOSS == "brier":
        f2 = f * f
        y1 = tl.sum(f2 * f, 1) + tie
        y2 = tl.sum(f2 * f2, 1) + tie
        x = z - finite(top)[:, None]
        e = exp(x)
        h = one_minus(x, e)
        g = tl.where(rest, h, 0.0)
        y3 = tl.sum(f * g, 1)
        y4 = tl.sum(f2 * g, 1)
        y5 = tl.sum(f2 * g * g, 1)
        if NESTED:
            # Against a larger maximum 1 - e becomes h + e (1 - e_old): only positive terms.
            s2 = scale * scale
            y1 += tl.sum(s2 * scale * x1, 1)
            y2 += tl.sum(s2 * s2 * x2, 1)
            y3 += tl.sum(scale * (h * mass + e * x3), 1)
            y4 += tl.sum(s2 * (h * square + e * x4), 1)
            y5 += tl.sum(s2 * (h * h * square + 2.0 * e * h * x4 + e * e * x5), 1)
    elif not SOFTMAX:
        if LOSS == "bce":
            u = sigmoid(z)
            u_top = sigmoid(top)
        else:
            u = z
            u_top = top
        if (LOSS == "bce") and LOG:
            log_base = finite(log_sigmoid(top2))[:, None]
            squares = tl.sum(tl.where(rest, exp(2.0 * (log_sigmoid(z) - log_base)), 0.0), 1) + tie
            if NESTED:
                squares += tl.sum(exp(2.0 * (log_sigmoid(second) - log_base)) * square, 1)
        else:
            squares = tl.sum(tl.where(rest, u * u, 0.0), 1)
            squares += tl.where(copies > 0.0, copies * u_top * u_top, 0.0)
            if NESTED:
                squares += tl.sum(square, 1)
            if (LOSS == "mse") and (not NESTED):
                squares = tl.where((top == lowest) & (copies >= 0.0), float("inf"), squares)
        if STATS:
            y1 = tl.sum(tl.where(rest, f * u, 0.0), 1) + tl.where(tie > 0.0, tie * u_top, 0.0)
            y2 = tl.sum(tl.where(rest, u, 0.0), 1) + tl.where(copies > 0.0, copies * u_top, 0.0)
            if NESTED:
                y1 += tl.sum(scale * x1, 1)
                y2 += tl.sum(x2, 1)
    if STATS and (LOSS != "brier"):
        y3 = tl.min(x3 if NESTED else tl.where(valid, z, float("inf")), 1)
    return top, top2, squares, masses, y1, y2, y3, y4, y5


@triton.jit
def store_moments(
    at, plane, mask, top, second, square, mass, x1, x2, x3, x4, x5, features, LOSS: tl.constexpr, STATS: tl.constexpr
):  # fmt: skip
    """Write the moments the loss uses and the features' partial square, in planes of ``plane`` elements."""
    tl.store(at, top, mask=mask)
    tl.store(at + plane, second, mask=mask)
    tl.store(at + 2 * plane, square, mask=mask)
    if ((LOSS == "cross_entropy") or (LOSS == "brier")) or STATS:
        tl.store(at + 3 * plane, mass, mask=mask)
    if (LOSS == "brier") or STATS:
        tl.store(at + 4 * plane, x1, mask=mask)
        tl.store(at + 5 * plane, x2, mask=mask)
        tl.store(at + 6 * plane, x3, mask=mask)
    if LOSS == "brier":
        tl.store(at + 7 * plane, x4, mask=mask)
        tl.store(at + 8 * plane, x5, mask=mask)
    tl.store(at + 9 * plane, features, mask=mask)


@triton.jit
def load_plane(at, mask, other):
    """Read past the first-level cache, which may hold what was there before another program wrote."""
    return tl.load(at, mask=mask, other=other, cache_modifier=".cg")


@triton.jit
def load_moments(at, plane, mask, LOSS: tl.constexpr, STATS: tl.constexpr):
    """Read what ``store_moments`` wrote; outside ``mask`` the empty row."""
    top = load_plane(at, mask, float("-inf"))
    second = load_plane(at + plane, mask, float("-inf"))
    square = load_plane(at + 2 * plane, mask, 0.0)
    none = tl.zeros_like(top)
    mass, x1, x2, x3, x4, x5 = none, none, none, none, none, none
    if ((LOSS == "cross_entropy") or (LOSS == "brier")) or STATS:
        mass = load_plane(at + 3 * plane, mask, 0.0)
    if (LOSS == "brier") or STATS:
        x1 = load_plane(at + 4 * plane, mask, 0.0)
        x2 = load_plane(at + 5 * plane, mask, 0.0)
        x3 = load_plane(at + 6 * plane, mask, 0.0 if LOSS == "brier" else float("inf"))
    if LOSS == "brier":
        x4 = load_plane(at + 7 * plane, mask, 0.0)
        x5 = load_plane(at + 8 * plane, mask, 0.0)
    return top, second, square, mass, x1, x2, x3, x4, x5, load_plane(at + 9 * plane, mask, 0.0)


@triton.jit
def empty_moments(ROWS: tl.constexpr, LOSS: tl.constexpr, STATS: tl.constexpr):
    """Moments ``[R]`` of rows without entries: the identity of ``reduce_moments``."""
    zero = tl.zeros([ROWS], tl.float32)
    lowest = zero + float("-inf")
    x3 = zero
    if STATS and (LOSS != "brier"):
        x3 = zero + float("inf")
    return lowest, lowest, zero, zero, zero, zero, x3, zero, zero


@triton.jit
def contrast_coefficients(
    top, second, square, mass, x1, x2, x3, x4, x5, LOSS: tl.constexpr, LOG: tl.constexpr
):  # fmt: skip
    """Per-row numbers from which ``contrast_value`` gives ``||delta^(k)||^2`` or its logarithm for every k.

    Returns ``(base, peak, c0, ..., c5)``; ``peak`` is the value of the maximal entry's contrast. For every other
    contrast the squares cancel exactly and leave a polynomial in ``exp(z_k - base)``, ``sigmoid(z_k)`` or ``z_k``.
    """
    base = finite(second)
    zero = tl.zeros_like(top)
    c0, c1, c2, c3, c4, c5 = zero, zero, zero, zero, zero, zero
    if (LOSS == "cross_entropy") or (LOSS == "brier"):
        rho, r, err = margin(top, second)
        a = 1.0 + rho * mass
        inv = 1.0 / a
        p_rest = rho * inv
        square_top = inv * inv + p_rest * p_rest * square
        tail = mass * mass + square
        if LOSS == "cross_entropy":
            c0 = square_top + 1.0
            c1 = 2.0 * p_rest
            if LOG:
                peak = 2.0 * r + (2.0 * err + tl.log(tail) - 2.0 * tl.log(a)) + 0.0 * rho
            else:
                peak = p_rest * p_rest * tail
        else:
            inv2 = inv * inv
            w1 = p_rest * inv2 * x4
            # Everything is divided by exp(second - top)^2, so that the logarithm holds at any margin.
            c1 = x3 * inv2 - w1 / square_top
            c2 = x5 * inv2 * inv2 - w1 * w1 / square_top
            c2 = tl.where(c2 < 0.0, 0.0, c2)
            c0 = square_top
            c3 = inv
            inner = x2 + x3 * inv * (2.0 * x1 + x3 * inv * square) + tail * tail * inv2
            if LOG:
                c4 = 2.0 * r + 2.0 * err + 1.3862943611198906
                peak = 2.0 * c4 - 1.3862943611198906 + tl.log(inner) - 4.0 * tl.log(a) + 0.0 * rho
            else:
                c4 = 2.0 * rho
                peak = 4.0 * p_rest * p_rest * p_rest * p_rest * inner
            c5 = p_rest
    elif LOSS == "bce":
        s = sigmoid(top)
        if LOG:
            log_second = log_sigmoid(second)
            scale = exp(2.0 * finite(log_second))
            c0 = s * s + scale * square + 1.0
            x = 2.0 * log_sigmoid(-top)
            y = 2.0 * log_second + tl.log(square)
            hi = tl.where(x > y, x, y)
            lo = tl.where(x > y, y, x)
            peak = hi + tl.log(1.0 + exp(lo - finite(hi)))
        else:
            c0 = s * s + square + 1.0
            s = sigmoid(-top)
            peak = s * s + square
    else:
        c0 = 4.0 * (top * top + square + 1.0)
        peak = 4.0 * ((top - 1.0) * (top - 1.0) + square)
        if LOG:
            peak = tl.log(peak)
    return base, peak, c0, c1, c2, c3, c4, c5


@triton.jit
def rest_value(z, base, c0, c1, c2, c3, c4, c5, LOSS: tl.constexpr, LOG: tl.constexpr):
    """``||delta^(k)||^2`` (or its logarithm) of contrasts whose logit ``z`` is not the maximal one."""
    if LOSS == "cross_entropy":
        v = c0 - c1 * exp(z - base)
    elif LOSS == "bce":
        v = c0 - 2.0 * sigmoid(z)
    elif LOSS == "mse":
        v = c0 - 8.0 * z
    else:
        f = exp(z - base)
        q = f * c3
        d = c1 + q
        v = c0 * d * d + c2 + q * q * (1.0 + 2.0 * c0 - 4.0 * (f * c5))
        if LOG:
            v = tl.log(v) + c4
        else:
            v = v * (c4 * c4)
    if LOG and (LOSS != "brier"):
        v = tl.log(v)
    return v


@triton.jit
def contrast_statistics(top, second, square, mass, x1, x2, x3, x4, x5, N, LOSS: tl.constexpr):
    """Minimum, maximum, mean, softmax expectation and the predicted class' value over the contrasts of each row.

    For brier the value is a cubic of the probability, so that its extremes are not those of the logits: the first
    two results are then the predicted class' value, to be combined with a sweep over the other contrasts.
    """
    base, peak, c0, c1, c2, c3, c4, c5 = contrast_coefficients(
        top, second, square, mass, x1, x2, x3, x4, x5, LOSS, False
    )
    others = tl.zeros_like(top) + (N - 1)
    rho, _, _ = margin(top, second)
    inv = 1.0 / (1.0 + rho * mass)
    low = peak
    high = peak
    if LOSS == "brier":
        q1 = c3 * mass
        q2 = c3 * c3 * square
        q3 = c3 * c3 * x1
        total = c0 * (others * c1 * c1 + 2.0 * c1 * q1 + q2) + others * c2 + (1.0 + 2.0 * c0) * q2
        total = (total - 4.0 * c5 * q3) * (c4 * c4)
        weighted = c0 * (c1 * c1 * mass + 2.0 * c1 * c3 * square + q3) + c2 * mass + (1.0 + 2.0 * c0) * q3
        weighted = (weighted - 4.0 * c5 * (c3 * c3 * x2)) * (c4 * c4)
    else:
        if LOSS == "cross_entropy":
            total = others * c0 - c1 * mass
            weighted = c0 * mass - c1 * square
        elif LOSS == "bce":
            total = others * c0 - 2.0 * x2
            weighted = c0 * mass - 2.0 * x1
        else:
            total = others * c0 - 8.0 * x2
            weighted = c0 * mass - 8.0 * x1
        v = rest_value(second, base, c0, c1, c2, c3, c4, c5, LOSS, False)
        low = tl.where((others > 0.0) & (v < low), v, low)
        v = rest_value(x3, base, c0, c1, c2, c3, c4, c5, LOSS, False)
        high = tl.where((others > 0.0) & (v > high), v, high)
    mean = tl.where(others > 0.0, peak + total, peak) / (others + 1.0)
    expected = (peak + tl.where(others > 0.0, rho * weighted, 0.0)) * inv
    return low, high, mean, expected, peak


@triton.jit
def target_value(
    zs, ys, stride_zn, stride_yn, N, valid, top, second, square, mass, x1, x2, x3, x4, x5,
    LOSS: tl.constexpr, KIND: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``||delta||^2`` (or its logarithm) of each row for the target ``KIND``: ``ones``, ``uniform`` or ``soft``.

    Rows are given as pointers; the moments of a loss that does not read them may be anything.
    """
    SOFTMAX: tl.constexpr = (LOSS == "cross_entropy") or (LOSS == "brier")
    if SOFTMAX:
        rho, _, _ = margin(top, second)
        tail = rho * mass
    if (LOSS == "cross_entropy") and (KIND == "soft"):
        value = cross_entropy_soft(
            zs, ys, stride_zn, stride_yn, N, valid, top, finite(second), rho, tail, ROWS, BLOCK_N
        )
    elif LOSS == "cross_entropy":
        value = cross_entropy_constant(zs, stride_zn, N, valid, top, tail, KIND == "uniform", ROWS, BLOCK_N)
    elif (LOSS == "brier") and (KIND == "soft"):
        value = brier_soft(
            zs, ys, stride_zn, stride_yn, N, valid, top, finite(second), rho, tail, ROWS, BLOCK_N
        )
    elif LOSS == "brier":
        # A constant target drops out: what is left is the contrast's polynomial at p_k = 0.
        _, _, c0, c1, c2, _, c4, _ = contrast_coefficients(
            top, second, square, mass, x1, x2, x3, x4, x5, LOSS, LOG
        )
        value = c0 * c1 * c1 + c2
        value = tl.log(value) + c4 if LOG else value * (c4 * c4)
    elif ((LOSS == "bce") and (KIND == "ones")) and LOG:
        value = log_of_ones(zs, stride_zn, N, valid, ROWS, BLOCK_N)
    else:
        value = elementwise(zs, ys, stride_zn, stride_yn, N, valid, KIND, LOSS == "bce", ROWS, BLOCK_N)
    CLOSED: tl.constexpr = ((LOSS == "brier") and (KIND != "soft")) or ((LOSS == "bce") and (KIND == "ones"))
    return tl.log(value) if LOG and (not CLOSED) else value
