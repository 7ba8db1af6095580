# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# ruff: noqa: SIM108 - choices between constants at compile time read better as statements
"""Leave-one-out moments of a row of logits, and what follows from them, as device functions.

Confident rows are the common case, and there ``p_k - 1`` and ``|p|^2 - 2 p_k + 1`` cancel to nothing. So a row is
summarised by sums that leave its maximum out. With ``m`` the maximum, ``m2`` the second largest logit (equal to
``m`` on a tie), ``f_j = exp(z_j - m2)``, ``g_j = 1 - exp(z_j - m)`` and every sum over all entries but one maximum,
the nine moments are

    ============  ==========  ===========================  =============================
    moment        cross_entropy, brier   bce, mse          with ``STATS`` (not brier)
    ============  ==========  ===========================  =============================
    m, m2         the two largest logits
    a1            sum f                  0                 sum f
    a2            sum f^2                sum u^2           sum u^2
    a3            brier: sum f^3         0                 bce, mse: sum f u
    a4            brier: sum f^4         0                 bce, mse: sum u
    a5            brier: sum f g         0                 min z
    a6, a7        brier: sum f^2 g, sum f^2 g^2
    ============  ==========  ===========================  =============================

with ``u = sigmoid(z)`` for bce and ``u = z`` for mse. Scaling by the second maximum keeps every sum away from
underflow at any margin; for the logarithm of bce (``LOG``) ``a2`` is scaled by ``sigmoid(m2)^2`` for the same reason.

A single logit is a row with ``m = z``, ``m2 = -inf`` and empty sums, so one associative reduction serves tiles of
logits and partial moments alike. The empty row (``m = m2 = -inf``, zero sums, ``min z = inf``) is its identity.
"""

import triton
import triton.language as tl


@triton.jit
def finite(x):
    """``x`` with minus infinity replaced by 0, so that differences to it stay defined."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def exp(x):
    """e^x for x up to 88, to about two units in the last place everywhere; NaN stays NaN.

    The hardware's exponential takes ``x * log2(e)`` rounded to float32, an error of 2e-6 at x = -40 that a square
    doubles. Reducing the argument first keeps the result's error independent of x.
    """
    x = tl.where(x < -200.0, -200.0, x)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6
    return tl.exp2(n) * tl.exp2(r * 1.4426950408889634)


@triton.jit
def one_minus(x, e):
    """``1 - exp(x)`` for x <= 0, given ``e = exp(x)``; relative accuracy also where x is tiny."""
    p = 2.48015873015873e-05 * x + 1.984126984126984e-04
    p = p * x + 1.388888888888889e-03
    p = p * x + 8.333333333333333e-03
    p = p * x + 4.1666666666666664e-02
    p = p * x + 1.6666666666666666e-01
    p = p * x + 0.5
    p = p * x + 1.0
    return tl.where(x > -0.4, -p * x, 1.0 - e)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) without overflow, relatively accurate on both tails."""
    e = exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + e^-x)), absolutely accurate."""
    e = exp(-tl.abs(x))
    return tl.where(x < 0.0, x, 0.0) - tl.log(1.0 + e)


@triton.jit
def reduce_moments(
    m,
    m2,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    valid,
    LOSS: tl.constexpr,
    LOG: tl.constexpr,
    STATS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Moments of each row of a tile ``[R, C]`` over its axis 1; entries outside ``valid`` do not exist.

    With ``NESTED`` the tile holds partial moments (invalid entries must be the empty row); without it ``m`` holds
    logits and the other operands are ignored.
    """
    lowest = float("-inf")
    m = tl.where(valid, m, lowest)
    top = tl.max(m, 1)
    is_top = valid & (m == top[:, None])
    copies = tl.sum(is_top.to(tl.float32), 1) - 1.0
    if NESTED:
        second = tl.where(is_top, m2, m)
        # An empty row adds nothing; a real maximum of minus infinity adds nothing that is not in its sums.
        rest = valid & (is_top == 0) & (m > lowest)
    else:
        second = tl.where(is_top, lowest, m)
        rest = valid & (is_top == 0)
    top2 = tl.where(copies > 0.0, top, tl.max(second, 1))
    base = finite(top2)[:, None]
    tie = tl.where(top2 > lowest, copies, 0.0)

    empty = tl.zeros_like(top)
    b1, b2, b3, b4, b5, b6, b7 = empty, empty, empty, empty, empty, empty, empty
    EXPONENTIAL: tl.constexpr = ((LOSS == "cross_entropy") or (LOSS == "brier")) or STATS
    if EXPONENTIAL:
        f = tl.where(rest, exp(m - base), 0.0)
        b1 = tl.sum(f, 1) + tie
        if NESTED:
            scale = exp(m2 - base)
            b1 += tl.sum(scale * a1, 1)
    if (LOSS == "cross_entropy") or (LOSS == "brier"):
        b2 = tl.sum(f * f, 1) + tie
        if NESTED:
            b2 += tl.sum(scale * scale * a2, 1)

    if LOSS == "brier":
        f2 = f * f
        b3 = tl.sum(f2 * f, 1) + tie
        b4 = tl.sum(f2 * f2, 1) + tie
        x = m - finite(top)[:, None]
        e = exp(x)
        h = one_minus(x, e)
        g = tl.where(rest, h, 0.0)
        b5 = tl.sum(f * g, 1)
        b6 = tl.sum(f2 * g, 1)
        b7 = tl.sum(f2 * g * g, 1)
        if NESTED:
            # Against a larger maximum 1 - e becomes h + e (1 - e_old): only positive terms.
            s2 = scale * scale
            b3 += tl.sum(s2 * scale * a3, 1)
            b4 += tl.sum(s2 * s2 * a4, 1)
            b5 += tl.sum(scale * (h * a1 + e * a5), 1)
            b6 += tl.sum(s2 * (h * a2 + e * a6), 1)
            b7 += tl.sum(s2 * (h * h * a2 + 2.0 * e * h * a6 + e * e * a7), 1)
    elif LOSS != "cross_entropy":
        if LOSS == "bce":
            u = sigmoid(m)
            u_top = sigmoid(top)
        else:
            u = m
            u_top = top
        if (LOSS == "bce") and LOG:
            log_base = finite(log_sigmoid(top2))[:, None]
            b2 = tl.sum(tl.where(rest, exp(2.0 * (log_sigmoid(m) - log_base)), 0.0), 1) + tie
            if NESTED:
                b2 += tl.sum(exp(2.0 * (log_sigmoid(m2) - log_base)) * a2, 1)
        else:
            b2 = tl.sum(tl.where(rest, u * u, 0.0), 1) + tl.where(copies > 0.0, copies * u_top * u_top, 0.0)
            if NESTED:
                b2 += tl.sum(a2, 1)
            if (LOSS == "mse") and (not NESTED):
                b2 = tl.where((top == lowest) & (copies >= 0.0), float("inf"), b2)
        if STATS:
            b3 = tl.sum(tl.where(rest, f * u, 0.0), 1) + tl.where(tie > 0.0, tie * u_top, 0.0)
            b4 = tl.sum(tl.where(rest, u, 0.0), 1) + tl.where(copies > 0.0, copies * u_top, 0.0)
            if NESTED:
                b3 += tl.sum(scale * a3, 1)
                b4 += tl.sum(a4, 1)
    if STATS and (LOSS != "brier"):
        if NESTED:
            b5 = tl.min(a5, 1)
        else:
            b5 = tl.min(tl.where(valid, m, float("inf")), 1)
    return top, top2, b1, b2, b3, b4, b5, b6, b7


@triton.jit
def tile_moments(z, valid, LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr):
    """Moments of each row of a tile of logits ``[R, C]``; entries outside ``valid`` do not exist."""
    return reduce_moments(z, z, z, z, z, z, z, z, z, valid, LOSS, LOG, STATS, False)


@triton.jit
def empty_moments(ROWS: tl.constexpr, LOSS: tl.constexpr, STATS: tl.constexpr):
    """Moments ``[R]`` of rows without entries: the identity of ``merge_moments``."""
    zero = tl.zeros([ROWS], tl.float32)
    lowest = zero + float("-inf")
    a5 = zero
    if STATS and (LOSS != "brier"):
        a5 = zero + float("inf")
    return lowest, lowest, zero, zero, zero, zero, a5, zero, zero


@triton.jit
def merge_moments(
    m,
    m2,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    n,
    n2,
    b1,
    b2,
    b3,
    b4,
    b5,
    b6,
    b7,
    LOSS: tl.constexpr,
    LOG: tl.constexpr,
    STATS: tl.constexpr,
):
    """Moments ``[R]`` of rows whose two parts have the moments ``(m, m2, a)`` and ``(n, n2, b)``."""
    pair = tl.join(m, n)
    return reduce_moments(
        pair,
        tl.join(m2, n2),
        tl.join(a1, b1),
        tl.join(a2, b2),
        tl.join(a3, b3),
        tl.join(a4, b4),
        tl.join(a5, b5),
        tl.join(a6, b6),
        tl.join(a7, b7),
        pair == pair,
        LOSS,
        LOG,
        STATS,
        True,
    )


@triton.jit
def margin(m, m2):
    """``exp(m2 - m)``, ``m2 - m`` and the rounding error of that difference.

    The error of the difference is half a unit of a number near 40, which a square of its exponential would show;
    it is known exactly (two-sum), so it is given back.
    """
    r = m2 - m
    back = r - m2
    err = (m2 - (r - back)) + (-m - back)
    err = tl.where(tl.abs(r) < float("inf"), err, 0.0)
    return exp(r) * (1.0 + err), r, err


@triton.jit
def contrast_coefficients(m, m2, a1, a2, a3, a4, a5, a6, a7, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Per-row numbers from which ``contrast_value`` gives ``||delta^(k)||^2`` or its logarithm for every k.

    Returns ``(m, base, top, c0, ..., c5)``; ``top`` is the value of the maximal entry's contrast. For every other
    contrast the squares cancel exactly and leave a polynomial in ``exp(z_k - base)``, ``sigmoid(z_k)`` or ``z_k``.
    """
    base = finite(m2)
    zero = tl.zeros_like(m)
    c0, c1, c2, c3, c4, c5 = zero, zero, zero, zero, zero, zero
    top = zero
    if (LOSS == "cross_entropy") or (LOSS == "brier"):
        rho, r, err = margin(m, m2)
        a = 1.0 + rho * a1
        # softmax of a row whose maximum is infinite (either sign) is undefined, as it is to autograd.
        rho = tl.where(tl.abs(m) < float("inf"), rho, float("nan"))
        inv = 1.0 / a
        p_rest = rho * inv
        square_top = inv * inv + p_rest * p_rest * a2
        if LOSS == "cross_entropy":
            c0 = square_top + 1.0
            c1 = 2.0 * p_rest
            tail = a1 * a1 + a2
            if LOG:
                top = 2.0 * r + (2.0 * err + tl.log(tail) - 2.0 * tl.log(a)) + 0.0 * rho
            else:
                top = p_rest * p_rest * tail
        else:
            inv2 = inv * inv
            w1 = p_rest * inv2 * a6
            # Everything is divided by exp(m2 - m)^2, so that the logarithm holds at any margin.
            c1 = a5 * inv2 - w1 / square_top
            c2 = a7 * inv2 * inv2 - w1 * w1 / square_top
            c2 = tl.where(c2 < 0.0, 0.0, c2)
            c0 = square_top
            c3 = inv
            t = a1 * a1 + a2
            inner = a4 + a5 * inv * (2.0 * a3 + a5 * inv * a2) + t * t * inv2
            if LOG:
                c4 = 2.0 * r + 2.0 * err + 1.3862943611198906
                top = 2.0 * c4 - 1.3862943611198906 + tl.log(inner) - 4.0 * tl.log(a) + 0.0 * rho
            else:
                c4 = 2.0 * rho
                top = 4.0 * p_rest * p_rest * p_rest * p_rest * inner
            c5 = p_rest
    elif LOSS == "bce":
        s = sigmoid(m)
        if LOG:
            lm2 = log_sigmoid(m2)
            scale = exp(2.0 * finite(lm2))
            c0 = s * s + scale * a2 + 1.0
            x = 2.0 * log_sigmoid(-m)
            y = 2.0 * lm2 + tl.log(a2)
            hi = tl.where(x > y, x, y)
            lo = tl.where(x > y, y, x)
            top = hi + tl.log(1.0 + exp(lo - finite(hi)))
        else:
            c0 = s * s + a2 + 1.0
            s = sigmoid(-m)
            top = s * s + a2
    else:
        c0 = 4.0 * (m * m + a2 + 1.0)
        top = 4.0 * ((m - 1.0) * (m - 1.0) + a2)
        if LOG:
            top = tl.log(top)
    return m, base, top, c0, c1, c2, c3, c4, c5


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
def contrast_value(z, m, base, top, c0, c1, c2, c3, c4, c5, LOSS: tl.constexpr, LOG: tl.constexpr):
    """``||delta^(k)||^2`` (or its logarithm) for logits ``z`` of any contrasts k. A tie is the maximum's equal."""
    return tl.where(z == m, top, rest_value(z, base, c0, c1, c2, c3, c4, c5, LOSS, LOG))


@triton.jit
def contrast_statistics(m, m2, a1, a2, a3, a4, a5, N, top, base, c0, c1, c2, c3, c4, c5, LOSS: tl.constexpr):
    """Minimum, maximum, mean, softmax expectation and the predicted class' value over the contrasts of each row.

    For brier the value is a cubic of the probability, so that its extremes are not those of the logits: the first
    two results are then the predicted class' value, to be combined with a sweep over the other contrasts.
    """
    others = tl.zeros_like(m) + (N - 1)
    rho, _, _ = margin(m, m2)
    rho = tl.where(tl.abs(m) < float("inf"), rho, float("nan"))
    inv = 1.0 / (1.0 + rho * a1)
    low = top
    high = top
    if LOSS == "brier":
        q1 = c3 * a1
        q2 = c3 * c3 * a2
        q3 = c3 * c3 * a3
        total = c0 * (others * c1 * c1 + 2.0 * c1 * q1 + q2) + others * c2 + (1.0 + 2.0 * c0) * q2
        total = (total - 4.0 * c5 * q3) * (c4 * c4)
        weighted = c0 * (c1 * c1 * a1 + 2.0 * c1 * c3 * a2 + q3) + c2 * a1 + (1.0 + 2.0 * c0) * q3
        weighted = (weighted - 4.0 * c5 * (c3 * c3 * a4)) * (c4 * c4)
    else:
        if LOSS == "cross_entropy":
            total = others * c0 - c1 * a1
            weighted = c0 * a1 - c1 * a2
        elif LOSS == "bce":
            total = others * c0 - 2.0 * a4
            weighted = c0 * a1 - 2.0 * a3
        else:
            total = others * c0 - 8.0 * a4
            weighted = c0 * a1 - 8.0 * a3
        v = rest_value(m2, base, c0, c1, c2, c3, c4, c5, LOSS, False)
        low = tl.where((others > 0.0) & (v < low), v, low)
        v = rest_value(a5, base, c0, c1, c2, c3, c4, c5, LOSS, False)
        high = tl.where((others > 0.0) & (v > high), v, high)
    mean = tl.where(others > 0.0, top + total, top) / (others + 1.0)
    expected = (top + tl.where(others > 0.0, rho * weighted, 0.0)) * inv
    return low, high, mean, expected, top
