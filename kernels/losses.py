# ruff: noqa: RET505 - choices between constants at compile time: a branch not taken is not compiled
"""The general form of a loss: sums over a row that merge, and all contrasts from these sums, also in log space.

For confident rows ``p_k - 1`` and ``|p|^2 - 2 p_k + 1`` cancel to nothing, so sums leave out one largest logit. They
are sums of powers of `share`, which is ``f_j = exp(z_j - r)`` for cross_entropy and brier, with r the second largest
logit; ``sigmoid(z_j)`` for bce, over that of r in log space; and ``z_j`` for mse. So no sum underflows that a logarithm
needs.

A new loss is a branch in `share`, `terms` and `value`, and in ``contrast.contrast_rows_kernel`` and ``target``.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .numerics import exp_difference, finite, log_sigmoid, one_minus, sigmoid, two_largest


class Moments(NamedTuple):
    """What is known of the logits of a row, or of a part of it: the two largest, and sums over all but one largest.

    ``s1`` and ``s2`` are sums of `share` and its square. Of ``brier`` alone are sums of its third and fourth power, and
    with ``g_j = 1 - exp(z_j - top)`` of ``f g``, ``f^2 g`` and ``f^2 g^2``; other losses have ``s2`` there.
    """

    top: tl.tensor
    second: tl.tensor
    s1: tl.tensor
    s2: tl.tensor
    s3: tl.tensor
    s4: tl.tensor
    fg: tl.tensor
    ffg: tl.tensor
    ffgg: tl.tensor


class Terms(NamedTuple):
    """What `value` takes of a row: the logits of `Moments`, the value of the largest, and a loss' own numbers."""

    top: tl.tensor
    second: tl.tensor
    predicted: tl.tensor
    constant: tl.tensor
    slope: tl.tensor
    squares: tl.tensor
    shift: tl.tensor
    inverse: tl.tensor
    scale: tl.tensor


@triton.jit
def share(z, base, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Return what the sums of a loss are made of."""
    if LOSS == "mse":
        return z
    elif (LOSS == "bce") and LOG:
        return tl.exp(log_sigmoid(z) - log_sigmoid(base))
    elif LOSS == "bce":
        return sigmoid(z)
    else:
        return tl.exp(z - base)


@triton.jit
def _sums(z, inside, top, second, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Return the moments of logits ``[R, C]``, given the row's two largest."""
    base = finite(second)
    left_out, tie = z > second[:, None], top == second  # no logit is left out on a tie
    if LOSS == "mse":
        # Outside, the shares of the other losses are 0. Infinite squares stay infinite.
        left_out, tie = left_out | (inside == 0), tie & (tl.abs(top) < float("inf"))
    f = tl.where(left_out, 0.0, share(z, base[:, None], LOSS, LOG))
    own = tl.where(tie, share(second, base, LOSS, LOG), 0.0)
    own2 = own * own
    s1, s2 = tl.sum(f, 1) - own, tl.sum(f * f, 1) - own2
    if LOSS == "brier":
        x = z - finite(top)[:, None]
        g = one_minus(x, tl.exp(x))
        fg = f * g
        return Moments(
            top, second, s1, s2, tl.sum(f * f * f, 1) - own2 * own, tl.sum(f * f * f * f, 1) - own2 * own2,
            tl.sum(fg, 1), tl.sum(f * fg, 1), tl.sum(fg * fg, 1),
        )  # fmt: skip
    else:
        return Moments(top, second, s1, s2, s2, s2, s2, s2, s2)


@triton.jit
def moments(z, inside, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Return the moments ``[R]`` of the rows of a tile ``[R, C]``, minus infinity where not ``inside``."""
    top, second = two_largest(z)
    return _sums(z, inside, top, second, LOSS, LOG)


@triton.jit
def merged(parts, exists, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Return the moments ``[R]`` of rows from those ``[R, C]`` of parts; where none ``exists``, logits are -inf."""
    top, second = two_largest(parts.top)
    second = tl.maximum(second, tl.max(parts.second, 1))
    # The parts' largest logits are logits like others; then come the sums without them.
    found = _sums(parts.top, exists, top, second, LOSS, LOG)
    scale = tl.where(exists, 1.0, 0.0)
    if (LOSS == "cross_entropy") or (LOSS == "brier") or (LOG and (LOSS == "bce")):
        scale = share(parts.second, finite(second)[:, None], LOSS, LOG)
    scale2 = scale * scale
    s1 = found.s1 + tl.sum(scale * parts.s1, 1)
    s2 = found.s2 + tl.sum(scale2 * parts.s2, 1)
    if LOSS == "brier":
        # Against a larger maximum, 1 - e becomes h + e (1 - e_old): only positive terms.
        x = parts.top - finite(top)[:, None]
        e = tl.exp(x)
        h = one_minus(x, e)
        return Moments(
            top, second, s1, s2,
            found.s3 + tl.sum(scale2 * scale * parts.s3, 1),
            found.s4 + tl.sum(scale2 * scale2 * parts.s4, 1),
            found.fg + tl.sum(scale * (h * parts.s1 + e * parts.fg), 1),
            found.ffg + tl.sum(scale2 * (h * parts.s2 + e * parts.ffg), 1),
            found.ffgg + tl.sum(scale2 * (h * h * parts.s2 + 2.0 * e * h * parts.ffg + e * e * parts.ffgg), 1),
        )  # fmt: skip
    else:
        return Moments(top, second, s1, s2, s2, s2, s2, s2, s2)


@triton.jit
def terms(m, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Return the `Terms` of rows from their moments: the squares of other contrasts cancel and leave a polynomial."""
    zero = tl.zeros_like(m.top)
    base = finite(m.second)
    if LOSS == "bce":
        own, less = sigmoid(m.top), sigmoid(-m.top)
        s2 = m.s2
        if LOG:
            least = sigmoid(base)
            s2 = least * least * s2
        predicted = less * less + s2
        constant = predicted + 2.0 * own
        if LOG:
            x = 2.0 * log_sigmoid(-m.top)
            y = 2.0 * log_sigmoid(base) + tl.log(m.s2)
            high = tl.where(x > y, x, y)
            predicted = high + tl.log(1.0 + tl.exp(tl.where(x > y, y, x) - finite(high)))
        return Terms(m.top, m.second, predicted, constant, zero + 2.0, zero, zero, zero, zero)
    elif LOSS == "mse":
        predicted = 4.0 * ((m.top - 1.0) * (m.top - 1.0) + m.s2)
        constant = tl.where(predicted < float("inf"), predicted + 8.0 * m.top, predicted)
        predicted = tl.log(predicted) if LOG else predicted
        return Terms(m.top, m.second, predicted, constant, zero + 8.0, zero, zero, zero, zero)
    rho, x, error = exp_difference(m.second, m.top)
    a = 1.0 + rho * m.s1
    inverse = 1.0 / a
    p = rho * inverse
    tail = m.s1 * m.s1 + m.s2
    if LOSS == "cross_entropy":
        # In this order, here and below, nothing leaves float32's range before the product does.
        predicted = p * tail * p
        constant = predicted + 2.0 * inverse
        if LOG:
            predicted = 2.0 * x + (2.0 * error + tl.log(tail) - 2.0 * tl.log(a)) + 0.0 * rho
        return Terms(m.top, m.second, predicted, constant, 2.0 * p, zero, zero, zero, zero)
    else:
        # Everything is divided by rho^2, so that the logarithm holds at any margin.
        squares = inverse * inverse + p * p * m.s2
        inverse2 = inverse * inverse
        mean = p * inverse2 * m.ffg
        shift = m.fg * inverse2 - mean / squares
        constant = m.ffgg * inverse2 * inverse2 - mean * mean / squares
        constant = tl.where(constant < 0.0, 0.0, constant)
        inner = m.s4 + m.fg * inverse * (2.0 * m.s3 + m.fg * inverse * m.s2) + tail * tail * inverse2
        if LOG:
            scale = 2.0 * x + 2.0 * error + 1.3862943611198906
            predicted = 2.0 * scale - 1.3862943611198906 + tl.log(inner) - 4.0 * tl.log(a) + 0.0 * rho
        else:
            scale = 2.0 * rho
            predicted = (2.0 * p * p) * inner * (2.0 * p * p)
        return Terms(m.top, m.second, predicted, constant, p, squares, shift, inverse, scale)


@triton.jit
def value(z, t, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Return ``||delta^(k)||^2`` (or its logarithm) of the contrasts whose logits are ``z``, for broadcast `Terms`."""
    base = finite(t.second)
    if LOSS == "brier":
        f = tl.exp(z - base)
        q = f * t.inverse
        d = t.shift + q
        v = t.squares * d * d + t.constant + q * q * (1.0 + 2.0 * t.squares - 4.0 * (f * t.slope))
        v = tl.log(v) + t.scale if LOG else v * (t.scale * t.scale)
    else:
        v = t.constant - t.slope * share(z, base, LOSS, False)
        if LOSS == "mse":
            v = tl.where(t.constant < float("inf"), v, t.constant)
        v = tl.log(v) if LOG else v
    return tl.where(z > t.second, t.predicted, v)


@triton.jit
def broadcast(rows):
    """Return the `Terms` ``[R]`` of rows as ``[R, 1]``."""
    return Terms(
        rows.top[:, None], rows.second[:, None], rows.predicted[:, None], rows.constant[:, None], rows.slope[:, None],
        rows.squares[:, None], rows.shift[:, None], rows.inverse[:, None], rows.scale[:, None],
    )  # fmt: skip
