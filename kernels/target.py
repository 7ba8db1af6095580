"""What else is asked of a row of logits: a fixed label's squared norm, or statistics over all contrasts."""

import triton
import triton.language as tl

from .losses import value
from .numerics import exp_difference, finite, log_sigmoid, one_minus, sigmoid


@triton.jit
def constant_sums(
    z, inside, m, N, LOSS: tl.constexpr, KIND: tl.constexpr, LOG: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Return sums ``[R]`` over logits ``[R, C]`` from which the norm for the labels ``ones`` or ``uniform`` follows.

    Those of ``d`` and ``d^2``: of cross_entropy's ``N p_j - 1``, over N for ``uniform``, and of other losses' entries
    of delta, where the first is 0. For bce and ``ones``, the second is a logarithm if ``LOG``. A constant label drops
    out of brier. ``WHOLE`` rows have no other logits.
    """
    size = tl.zeros_like(m.top) + N
    none = tl.zeros_like(m.top)
    if LOSS == "cross_entropy":
        # N p_j - 1 is the deviation of e_j from its mean, over that mean: a difference of g_j = 1 - e_j keeps it exact
        # if all logits are nearly equal.
        rho, _, _ = exp_difference(m.second, m.top)
        mean = (1.0 + rho * m.s1) / size
        x = z - finite(m.top)[:, None]
        g = one_minus(x, tl.exp(x))
        centre = tl.sum(tl.where(inside, g, 0.0), 1) / size if WHOLE else 1.0 - mean
        d = tl.where(inside, centre[:, None] - g, 0.0)
        scale = mean * size if KIND == "uniform" else mean
        return none if WHOLE else tl.sum(d, 1) / scale, tl.sum(d * d, 1) / scale / scale
    if (LOSS == "bce") and LOG and (KIND == "ones"):
        low = tl.min(tl.where(inside, z, float("inf")), 1)
        high = finite(log_sigmoid(-low))
        rest = tl.exp(2.0 * (log_sigmoid(-z) - high[:, None]))
        return none, 2.0 * high + tl.log(tl.sum(tl.where(inside, rest, 0.0), 1))
    label = (none + 1.0 if KIND == "ones" else 1.0 / size)[:, None]
    d = 2.0 * (z - label)
    if LOSS == "bce":
        d = tl.where(z > 0.0, (1.0 - label) - sigmoid(-z), sigmoid(z) - label)
    d = tl.where(inside, d, 0.0)
    return none, tl.sum(d * d, 1)


@triton.jit
def constant_brier(t, LOG: tl.constexpr):
    """Return brier's norm for a constant label, its contrasts' polynomial at ``p_k = 0``, or its logarithm."""
    v = t.squares * t.shift * t.shift + t.constant
    return tl.log(v) + t.scale if LOG else v * (t.scale * t.scale)


@triton.jit
def statistics(z, inside, t, LOSS: tl.constexpr):
    """Return minimum, maximum and sum of the contrasts v of logits, and sums of e v and e, for e = exp(z - top)."""
    rho, _, _ = exp_difference(t.second, t.top)
    v = value(z, t, LOSS, False)
    e = tl.where(z > t.second, 1.0, rho * tl.exp(z - finite(t.second)))
    low, high = tl.min(tl.where(inside, v, float("inf")), 1), tl.max(tl.where(inside, v, float("-inf")), 1)
    total = tl.sum(tl.where(inside, v, 0.0), 1)
    # Minimum and maximum pass over NaN, of which there is one in a row only if all are.
    lost = tl.where(total == total, 0.0, total)
    weighted, weight = tl.sum(tl.where(inside, e * v, 0.0), 1), tl.sum(tl.where(inside, e, 0.0), 1)
    return low + lost, high + lost, total, weighted, weight
