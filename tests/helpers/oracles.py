"""What the closed forms are checked against; nothing here imports the package under test.

- ``contrast_autograd``: one float64 backward pass per contrast through a real ``nn.Linear`` head. The definition
  itself, but autograd forms ``p_k - 1``, so even in float64 it loses all digits for confident rows.
- ``contrast_norms``, ``target_norms``: the textbook formulas in 80-digit arithmetic, good at any margin; they return
  ``mpmath`` numbers, so that values far below float64's range keep their logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mpmath
import torch
import torch.nn.functional as F

DIGITS = 80
#: The largest relative error of a kernel, and float32's smallest normal number.
PROMISE, SMALLEST_NORMAL = 1e-5, 2.0**-126


def loss_value(logits: torch.Tensor, target: torch.Tensor, loss: str) -> torch.Tensor:
    """The loss itself, summed over classes, one number a row; ``target`` has the logits' shape."""
    if loss == "cross_entropy":
        return -(target * F.log_softmax(logits, -1)).sum(-1)
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    if loss == "mse":
        return (logits - target).square().sum(-1)
    if loss == "brier":
        return (logits.softmax(-1) - target).square().sum(-1)
    raise ValueError(loss)


def contrast_autograd(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, loss: str
) -> torch.Tensor:
    """``(B, N)`` squared norms of the head's gradients, one float64 backward pass per sample and contrast."""
    B, N = features.shape[0], weight.shape[0]
    out = torch.empty(B, N, dtype=torch.float64)
    w = weight.detach().double().requires_grad_()
    b = bias.detach().double().requires_grad_() if bias is not None else None
    parameters = [w] if b is None else [w, b]
    for i in range(B):
        for k in range(N):
            z = F.linear(features[i].double(), w, b)
            y = F.one_hot(torch.tensor(k), N).double()
            gradients = torch.autograd.grad(loss_value(z, y, loss), parameters)
            out[i, k] = sum(g.square().sum() for g in gradients)
    return out


def _probabilities(row: Sequence[float]) -> list[mpmath.mpf]:
    top = max(row)
    e = [mpmath.exp(mpmath.mpf(z) - mpmath.mpf(top)) if z != -math.inf else mpmath.mpf(0) for z in row]
    total = mpmath.fsum(e)
    return [x / total for x in e]


def _sigmoid(z: float) -> mpmath.mpf:
    return mpmath.mpf(0) if z == -math.inf else 1 / (1 + mpmath.exp(-mpmath.mpf(z)))


def contrast_norms(row: Sequence[float], loss: str, digits: int = DIGITS) -> list[mpmath.mpf]:
    """``||delta^(k)||^2`` for every k of one row of logits, from power sums.

    80 digits leave 10 correct ones at a margin of 40 for brier, whose value there is exp(-160); every further unit of
    the margin takes almost two more.
    """
    with mpmath.workdps(digits):
        if loss in ("cross_entropy", "brier"):
            u = _probabilities(row)
        elif loss == "bce":
            u = [_sigmoid(z) for z in row]
        else:
            u = [mpmath.mpf(z) for z in row]
        s2 = mpmath.fsum(x**2 for x in u)
        if loss != "brier":
            factor = 4 if loss == "mse" else 1
            return [factor * (s2 - 2 * x + 1) for x in u]
        s3, s4 = mpmath.fsum(x**3 for x in u), mpmath.fsum(x**4 for x in u)
        out = []
        for x in u:
            c = s2 - x
            out.append(4 * (s4 - 2 * c * s3 + c**2 * s2 + x**2 * (1 - 2 * (x - c))))
        return out


def target_norms(row: Sequence[float], target: Sequence[float], loss: str) -> mpmath.mpf:
    """``||delta||^2`` of one row of logits for any target vector, in 80 digits."""
    with mpmath.workdps(DIGITS):
        y = [mpmath.mpf(t) for t in target]
        if loss == "bce":
            delta = [_sigmoid(z) - t for z, t in zip(row, y, strict=True)]
        elif loss == "mse":
            delta = [2 * (mpmath.mpf(z) - t) for z, t in zip(row, y, strict=True)]
        else:
            p = _probabilities(row)
            if loss == "cross_entropy":
                total = mpmath.fsum(y)
                delta = [x * total - t for x, t in zip(p, y, strict=True)]
            else:
                mean = mpmath.fsum(x * (x - t) for x, t in zip(p, y, strict=True))
                delta = [2 * x * (x - t - mean) for x, t in zip(p, y, strict=True)]
        return mpmath.fsum(d**2 for d in delta)


def logarithm(value: mpmath.mpf) -> float:
    """Natural logarithm as a float; minus infinity for zero."""
    return -math.inf if value == 0 else float(mpmath.log(value))


def square_norm(row: Sequence[float], bias: bool = True) -> mpmath.mpf:
    """``||h||^2 + bias`` of one row of features, without rounding."""
    with mpmath.workdps(DIGITS):
        return mpmath.fsum(mpmath.mpf(x) ** 2 for x in row) + int(bias)


def check(got: float, exact: mpmath.mpf, log: bool, *place: int) -> None:
    """Compare a number of a kernel, or its logarithm, with the exact one."""
    if log:
        # Rounded to float32 itself: two units in its last place come on top.
        expected = logarithm(exact)
        allowed = PROMISE + 2**-22 * abs(expected) if math.isfinite(expected) else 0
        assert got == expected or abs(got - expected) <= allowed, (*place, got, expected)
    elif exact >= SMALLEST_NORMAL:
        assert abs(got / float(exact) - 1) <= PROMISE, (*place, got, float(exact))
    else:
        # Below float32's range only the logarithm keeps its digits.
        assert 0 <= got <= 1.01 * SMALLEST_NORMAL, (*place, got)


def check_contrasts(
    out: torch.Tensor, features: torch.Tensor, logits: torch.Tensor, loss: str, log: bool, bias: bool = True,
    rows: Sequence[int] | None = None, digits: int = DIGITS,
) -> None:  # fmt: skip
    """Compare all contrasts of some rows, by default of all, on exactly the numbers that the kernel saw."""
    assert out.dtype == torch.float32
    for b in range(len(out)) if rows is None else rows:
        factor = square_norm(features[b].double().tolist(), bias)
        exact = contrast_norms(logits[b].double().tolist(), loss, digits)
        for k, (got, value) in enumerate(zip(out[b].tolist(), exact, strict=True)):
            check(got, value * factor, log, b, k)


def contrast_matrix(logits: torch.Tensor, loss: str, *, log: bool = False) -> torch.Tensor:
    """``contrast_norms`` of every row of ``(B, N)`` logits, as float64."""
    rows = [contrast_norms(row, loss) for row in logits.double().tolist()]
    convert = logarithm if log else float
    return torch.tensor([[convert(v) for v in row] for row in rows], dtype=torch.float64).reshape(logits.shape)


def confident_logits(B: int, N: int, margin: float, generator: torch.Generator) -> torch.Tensor:
    """Random ``(B, N)`` float32 logits whose largest entry leads the second by ``margin``, at a random place."""
    z = torch.randn(B, N, generator=generator)
    if N > 1:
        place = torch.randint(N, (B, 1), generator=generator)
        rest = z.scatter(1, place, -math.inf).amax(1, keepdim=True)
        z.scatter_(1, place, rest + margin)
    return z
