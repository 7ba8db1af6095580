"""Elementary functions that stay relatively accurate where the obvious form cancels or overflows."""

import triton
import triton.language as tl


@triton.jit
def finite(x):
    """Return ``x`` with minus infinity replaced by 0, so that differences to it stay defined."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def exp(x):
    """Return e^x for x up to 88, to about two units in the last place, at least the least normal number; NaN stays NaN.

    Hardware rounds ``x * log2(e)`` to float32, an error of 2e-6 at x = -40, so the integer part n is taken out first: a
    large number added rounds to n and leaves it in the lowest bits, from where it becomes the exponent of ``2^n``.
    """
    x = tl.maximum(x, -87.33, propagate_nan=tl.PropagateNan.ALL)
    shifted = x * 1.4426950408889634 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.exp2(r * 1.4426950408889634) * power


@triton.jit
def one_minus(x, e):
    """Return ``1 - exp(x)`` for x <= 0, given ``e = exp(x)``, relatively accurate also for tiny x."""
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
    """Return 1 / (1 + e^-x) without overflow, relatively accurate on both tails."""
    e = exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def log_sigmoid(x):
    """Return log(1 / (1 + e^-x)), absolutely accurate."""
    e = exp(-tl.abs(x))
    return tl.where(x < 0.0, x, 0.0) - tl.log(1.0 + e)


@triton.jit
def margin(top, second):
    """Return ``exp(second - top)``, ``second - top`` and that difference's rounding error, known exactly (two-sum).

    The error is half a unit of a number near 40, which would show in a square of the exponential. The softmax of a row
    whose maximum is infinite (either sign) is undefined, as it is to autograd: the exponential is then NaN.
    """
    r = second - top
    back = r - second
    err = (second - (r - back)) + (-top - back)
    err = tl.where(tl.abs(r) < float("inf"), err, 0.0)
    return tl.where(tl.abs(top) < float("inf"), exp(r) * (1.0 + err), float("nan")), r, err
