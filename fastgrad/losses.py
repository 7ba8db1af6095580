"""The loss table: the one place where the mathematics of a loss lives.

A classifier ends in ``z = W h + b`` and a loss ``L(z, y)`` with ``delta = dL/dz``. Every last-layer gradient of one
sample is rank one, so its squared norm is ``||delta||^2 (||h||^2 + 1)`` and only ``delta`` depends on the loss. For
the contrast class ``k`` (label ``e_k``), summed over classes:

=============  ====================================  ========================================
loss           ``delta_j``                           ``||delta||^2``
=============  ====================================  ========================================
cross_entropy  ``p_j - [j = k]``                     ``T + 1 - 2 p_k``, ``T = sum p_j^2``
bce            ``s_j - [j = k]``                     ``T + 1 - 2 s_k``, ``T = sum s_j^2``
mse            ``2 (z_j - [j = k])``                 ``4 (T + 1 - 2 z_k)``, ``T = sum z_j^2``
brier          ``2 p_j (p_j - [j = k] - S2 + p_k)``  a cubic in ``p_k``
=============  ====================================  ========================================

with ``p = softmax(z)``, ``s = sigmoid(z)``, ``S2 = sum p_j^2``. These forms are well conditioned for every class but
the largest logit ``i``: there they cancel if the network is confident. That entry is computed from
*leave-one-out* sums, which never form ``p_i - 1`` and whose terms all have the same sign. Detectors take logarithms of
these norms, so relative accuracy matters, and ``log=True`` stays in log space where the square underflows.

All functions are differentiable with respect to the logits and accept any leading shape. They compute in float64 for
float64 and in float32 for all other dtypes. The caller has checked the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

TARGETS = ("ones", "uniform", "predicted")
REDUCTIONS = ("sum", "mean")


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of computations and results: float64 if one of ``dtypes`` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(compute_dtype(logits.dtype))


class _LeaveOneOut(NamedTuple):
    """Softmax relative to its largest logit ``i``; ``(..., 1)`` unless noted. ``second`` is the next largest logit.

    It has no properties: torch.compile of PyTorch 2.8 does not follow those of a named tuple.
    """

    top: Tensor  # (..., N) bool, true at i only, also under ties
    log_rho: Tensor  # second - z_i <= 0
    f: Tensor  # (..., N) exp(z_j - second), 0 at i
    gap: Tensor  # (..., N) 1 - exp(z_j - z_i) >= 0, 0 at i
    a: Tensor  # sum_j exp(z_j - z_i) >= 1
    p_others: Tensor  # (..., N) softmax with the entry i set to 0


def _top(z: Tensor) -> Tensor:
    index = z.detach().argmax(-1, keepdim=True)
    return torch.zeros_like(z, dtype=torch.bool).scatter(-1, index, True)


def _leave_one_out(z: Tensor) -> _LeaveOneOut:
    top = _top(z)
    peak = torch.where(top, z, 0).sum(-1, keepdim=True)
    peak = peak + 0 * peak  # NaN if infinite: the softmax of such a row is undefined
    others = z.masked_fill(top, -torch.inf)
    # The reference point of f cancels mathematically, so it needs no gradient. It must be finite: N = 1 has no
    # second logit, and a masked vocabulary may have no finite one.
    second = others.detach().amax(-1, keepdim=True)
    second = torch.where(second == -torch.inf, peak.detach(), second)
    f = torch.exp(others - second)
    log_rho = second - peak
    gap = -torch.expm1(torch.where(top, 0, z - peak))
    a = 1 + log_rho.exp() * f.sum(-1, keepdim=True)
    return _LeaveOneOut(top, log_rho, f, gap, a, f * (log_rho.exp() / a))


def _soft_target(z: Tensor, target: str | Tensor) -> Tensor:
    """Return the target as soft labels, broadcastable to ``(..., N)``."""
    if isinstance(target, Tensor):
        if target.is_floating_point():
            return target.to(z.dtype)
        return one_hot(target.long(), z.shape[-1]).to(z.dtype)
    if target == "ones":
        return torch.ones_like(z)
    if target == "uniform":
        return torch.full_like(z, 1 / z.shape[-1])
    if target == "predicted":
        return _top(z).to(z.dtype)
    raise ValueError(f"target must be one of {', '.join(map(repr, TARGETS))}, or a tensor; it was {target!r}")


def _cross_entropy_delta(z: Tensor, target: str | Tensor) -> Tensor:
    loo = _leave_one_out(z)
    p_others = loo.p_others
    y = _soft_target(z, target)
    y_others = torch.where(loo.top, 0, y)
    mass = y.sum(-1, keepdim=True)
    # Where p_i is at least 1/2, sum_j delta_j = 0 gives the entry i without the cancellation in mass * p_i - y_i.
    at_top = y_others.sum(-1, keepdim=True) - mass * p_others.sum(-1, keepdim=True)
    at_top = torch.where(loo.a > 2, mass / loo.a - y, at_top)
    delta = torch.where(loo.top, at_top, mass * p_others - y)
    # N p_j - 1 cancels if all logits and all labels are nearly equal; differences from the entry i do not.
    size, step = z.shape[-1], y - torch.where(loo.top, y, 0).sum(-1, keepdim=True)
    centred = y * loo.gap.sum(-1, keepdim=True) - mass * loo.gap + (step.sum(-1, keepdim=True) - size * step)
    equal = (2 * loo.a > size) & (size * step.abs().amax(-1, keepdim=True) < 0.4 * mass.abs())
    return torch.where(equal, centred / loo.a, delta)


def _cross_entropy_diagonal(z: Tensor) -> Tensor:
    loo = _leave_one_out(z)
    p = loo.p_others
    return -torch.where(loo.top, p.sum(-1, keepdim=True), 1 - p)


def _bce_delta(z: Tensor, target: str | Tensor) -> Tensor:
    y = _soft_target(z, target)
    return torch.where(z > 0, (1 - y) - torch.sigmoid(-z), torch.sigmoid(z) - y)


def _brier_delta(z: Tensor, target: str | Tensor) -> Tensor:
    scaled, log_rho = _brier_scaled(z, target)
    return scaled * log_rho.exp()


def _brier_scaled(z: Tensor, target: str | Tensor) -> tuple[Tensor, Tensor]:
    """Return ``delta / rho``, which never underflows, and ``log(rho)``."""
    # With g = p - y: delta_j = 2 p_j sum_l p_l (g_j - g_l). Seen from i, only D_l = g_i - g_l is needed.
    loo = _leave_one_out(z)
    y = _soft_target(z, target)
    y_top = torch.where(loo.top, y, 0).sum(-1, keepdim=True)
    step = y_top - y  # y_i - y_l, exactly 0 at i
    e_others = loo.f * loo.log_rho.exp()
    near = loo.gap - loo.a * step
    # The same value, arranged for step near 1: a - 1 would be 0 if the other terms are below the dtype's precision.
    far = ((1 - y_top) + y) - e_others - e_others.sum(-1, keepdim=True) * step
    difference = torch.where(loo.top, 0, torch.where(step > 0.5, far, near)) / loo.a
    p = loo.f / loo.a  # without rho
    mean = (p * difference).sum(-1, keepdim=True)
    return 2 * torch.where(loo.top, mean / loo.a, p * (loo.log_rho.exp() * mean - difference)), loo.log_rho


def _brier_diagonal(z: Tensor) -> Tensor:
    loo = _leave_one_out(z)
    p = loo.p_others
    missing = p.sum(-1, keepdim=True)  # 1 - p_i
    s2_others = (p * p).sum(-1, keepdim=True)
    at_top = (missing * missing + s2_others) / loo.a
    s2 = s2_others + loo.a**-2
    return -2 * torch.where(loo.top, at_top, p * (1 + s2 - 2 * p))


def _linear_form(u: Tensor, total: Tensor, top: Tensor, at_top: Tensor, log: bool) -> Tensor:
    """Return ``at_top`` (a logarithm already if ``log``) at the largest logit, and ``T + 1 - 2 u_k`` elsewhere."""
    rest = total + 1 - 2 * u
    return torch.where(top, at_top, torch.where(top, 1, rest).log() if log else rest)


def _cross_entropy_norms(z: Tensor, log: bool) -> Tensor:
    loo = _leave_one_out(z)
    p = loo.p_others
    total = (p * p).sum(-1, keepdim=True) + loo.a**-2
    t1, t2 = loo.f.sum(-1, keepdim=True), (loo.f * loo.f).sum(-1, keepdim=True)
    if log:
        at_top = 2 * loo.log_rho + (t1 * t1 + t2).log() - 2 * loo.a.log()
    else:
        # In this order, no factor leaves the dtype's range before the product does.
        share = loo.log_rho.exp() / loo.a
        at_top = share * (t1 * t1 + t2) * share
    return _linear_form(p, total, loo.top, at_top, log)


def _bce_norms(z: Tensor, log: bool) -> Tensor:
    top = _top(z)
    s = torch.sigmoid(z)
    # Flipping the sign of z_i turns its term into the leave-one-out term.
    turned = torch.where(top, -z, z)
    if log:
        at_top = torch.logsumexp(2 * logsigmoid(turned), -1, keepdim=True)
    else:
        at_top = torch.sigmoid(turned).square().sum(-1, keepdim=True)
    return _linear_form(s, s.square().sum(-1, keepdim=True), top, at_top, log)


def _mse_norms(z: Tensor, log: bool) -> Tensor:
    top = _top(z)
    at_top = torch.where(top, z - 1, z).square().sum(-1, keepdim=True)
    if log:
        at_top = at_top.log()
    total = z.square().sum(-1, keepdim=True)
    # All are infinite in a row with an infinite logit.
    result = _linear_form(torch.where(total == torch.inf, 0, z), total, top, at_top, log)
    return result + math.log(4) if log else 4 * result


def _brier_norms(z: Tensor, log: bool) -> Tensor:
    # The largest logit's entry has a factor rho^4, all others have rho^2; both are first computed without it.
    loo = _leave_one_out(z)
    rho, a, f = loo.log_rho.exp(), loo.a, loo.f
    c1 = (f * loo.gap).sum(-1, keepdim=True) / a  # sum_l p_l q_l, q = p_i - p, without rho / a
    t1, t2, t3, t4 = (f.pow(n).sum(-1, keepdim=True) for n in (1, 2, 3, 4))
    at_top = (t4 + 2 * c1 * t3 + c1 * c1 * t2 + ((t1 * t1 + t2) / a) ** 2) / a**4

    p = loo.p_others
    s2 = (p * p).sum(-1, keepdim=True) + a**-2
    q = loo.gap / a
    mean_q = rho * (f * f * q).sum(-1, keepdim=True) / (a * a * s2)  # p^2-weighted mean of q, without rho
    spread = (mean_q / a).square() + (f * (q - rho * mean_q) / a).square().sum(-1, keepdim=True)
    rest = s2 * ((c1 + f) / a - mean_q).square() + spread + (f / a).square() * (1 - 4 * p + 2 * s2)
    if log:
        log_rest = 2 * loo.log_rho + torch.where(loo.top, 1, rest).log()
        return math.log(4) + torch.where(loo.top, 4 * loo.log_rho + at_top.log(), log_rest)
    # The last factor comes last: rho^4 alone may lie below the dtype's range where the product does not.
    return torch.where(loo.top, rho**2 * at_top, rest) * (4 * rho**2)


class _Loss(NamedTuple):
    """A loss: three functions of logits ``z``, already in the dtype of the computation, that return ``(..., N)``."""

    delta: Callable[[Tensor, str | Tensor], Tensor]  # of z and a target: the gradient
    diagonal: Callable[[Tensor], Tensor]  # of z: the entry k of contrast k's gradient
    norms: Callable[[Tensor, bool], Tensor]  # of z and whether to take logarithms: every contrast's ||delta||^2


_TABLE = {
    "cross_entropy": _Loss(_cross_entropy_delta, _cross_entropy_diagonal, _cross_entropy_norms),
    "bce": _Loss(_bce_delta, lambda z: -torch.sigmoid(-z), _bce_norms),
    "mse": _Loss(lambda z, target: 2 * (z - _soft_target(z, target)), lambda z: 2 * (z - 1), _mse_norms),
    "brier": _Loss(_brier_delta, _brier_diagonal, _brier_norms),
}
LOSSES = tuple(_TABLE)


def delta(logits: Tensor, target: str | Tensor, *, loss: str, reduction: str = "sum") -> Tensor:
    """Return the gradient of the loss at the logits, ``(..., N)``, with a small relative error even at high confidence.

    ``target`` is ``"ones"``, ``"uniform"``, ``"predicted"``, class indices ``(...)`` or soft targets ``(..., N)``.
    ``reduction`` over classes is ``"sum"`` or ``"mean"`` (divides by N). The result is float32, or float64 for float64.
    """
    z = _upcast(logits)
    result = _TABLE[loss].delta(z, target)
    return result / z.shape[-1] if reduction == "mean" else result


def contrast_delta(logits: Tensor, *, loss: str, reduction: str = "sum") -> Tensor:
    """Return ``delta`` of every one-hot contrast: ``(..., N, N)``, where ``[..., k, :]`` belongs to contrast ``k``."""
    classes = logits.shape[-1]
    labels = torch.eye(classes, device=logits.device, dtype=compute_dtype(logits.dtype))
    every = logits.unsqueeze(-2).expand(*logits.shape, classes)
    return delta(every, labels, loss=loss, reduction=reduction)


def contrast_diagonal(logits: Tensor, *, loss: str) -> Tensor:
    """Return entry ``k`` of contrast ``k``'s ``delta``, for all k: ``(..., N)``. It scales the introspective rows."""
    return _TABLE[loss].diagonal(_upcast(logits))


def contrast_norms(logits: Tensor, *, loss: str, reduction: str = "sum", log: bool = False) -> Tensor:
    """Return ``||delta^(k)||^2`` of every one-hot contrast ``k``: ``(..., N)``, or its logarithm.

    A plain value below the dtype's smallest normal number loses digits; its logarithm does not. In float32, with two
    classes, this begins at a logit margin of 44 for cross_entropy and 23 for brier; with more classes, at larger ones.
    """
    result = _TABLE[loss].norms(_upcast(logits), log)
    return _reduced(result, logits.shape[-1], reduction, log)


def target_norms(
    logits: Tensor, target: str | Tensor, *, loss: str, reduction: str = "sum", log: bool = False
) -> Tensor:
    """Return ``||delta||^2`` for one label per sample: ``(...)``, or its logarithm; ``target`` as in :func:`delta`."""
    if isinstance(target, str) and target == "predicted":
        target = logits.detach().argmax(-1)
    if isinstance(target, Tensor) and not target.is_floating_point():
        every = contrast_norms(logits, loss=loss, reduction=reduction, log=log)
        return every.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)
    z = _upcast(logits)
    if not log:
        result = _TABLE[loss].delta(z, target).square().sum(-1)
    elif loss == "bce" and isinstance(target, str) and target == "ones":
        result = torch.logsumexp(2 * logsigmoid(-z), -1)
    else:
        d, scale = _brier_scaled(z, target) if loss == "brier" else (_TABLE[loss].delta(z, target), z.new_zeros(()))
        largest = d.detach().abs().amax(-1, keepdim=True)
        largest = torch.where(largest == 0, 1, largest)
        result = (d / largest).square().sum(-1).log() + 2 * (largest.log() + scale).squeeze(-1)
    return _reduced(result, logits.shape[-1], reduction, log)


def _reduced(value: Tensor, classes: int, reduction: str, log: bool) -> Tensor:
    if reduction == "sum":
        return value
    return value - 2 * math.log(classes) if log else value / classes**2
