"""Elementary functions that stay relatively accurate where the obvious form cancels or overflows."""

import triton
import triton.language as tl


@triton.jit
def finite(x):
    """Return ``x`` with minus infinity replaced by 0, so that differences to it stay defined."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def larger_two(first, second, other_first, other_second):
    """Return the two largest of two pairs in descending order."""
    low = tl.minimum(first, other_first)
    return tl.maximum(first, other_first), tl.maximum(low, tl.maximum(second, other_second))


@triton.jit
def two_largest(z):
    """Return the two largest numbers of every row of a tile; they are equal on a tie. NaN is passed over."""
    return tl.reduce((z, tl.full(z.shape, float("-inf"), tl.float32)), 1, larger_two)


@triton.jit
def exp_difference(low, high):
    """Return ``exp(low - high)``, NaN if high is infinite, and ``low - high`` with its rounding error; ``low <= high``.

    The error is half a unit of a number near 40, which would show in a square of the exponential. Two-sum knows it.
    """
    x = low - high
    back = x - low
    error = tl.where(x > float("-inf"), (low - (x - back)) + (-high - back), 0.0)
    # The softmax of a row whose maximum is infinite is undefined, as it is to autograd.
    return tl.exp(x) * (1 + error) + 0.0 * high, x, error


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
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def log_sigmoid(x):
    """Return log(1 / (1 + e^-x)), absolutely accurate."""
    return tl.where(x < 0.0, x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
