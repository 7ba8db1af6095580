"""Multinomial logistic regression on clean samples and challenges, which count equally."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from fastgrad.ops.dispatch import full_precision


def equal_shares(challenging: Tensor) -> Tensor:
    """Return weights ``(n,)``, float64, by which the challenging samples weigh a half in all, like the others."""
    count = challenging.double().sum()
    return torch.where(challenging, 0.5 / count, 0.5 / (len(challenging) - count))


def fit_softmax(
    rows: Tensor,
    codes: Tensor,
    shares: Tensor,
    offset: Tensor,
    penalty: float,
    *,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """Return weights W and, in the last row, biases b, ``(d + 1, C)``, float64.

    They minimise the cross-entropy of ``rows W + b + offset``, by the samples' ``shares`` ``(n,)``, plus ``penalty
    ||W||^2 / 2``. ``rows`` are ``(n, d)``, ``codes`` class indices ``(n,)``, and ``offset`` is ``(C,)`` or ``(n, C)``.
    Products are in float32: L-BFGS (Liu and Nocedal, "On the limited memory BFGS method for large scale optimization",
    1989), of so many ``steps`` at most, ends long before their rounding matters.
    """
    x, offset = rows.detach().float().contiguous(), offset.float()
    codes, shares = codes.unsqueeze(1), shares.float().unsqueeze(1)
    shape = (x.shape[1] + 1, offset.shape[-1])

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        values = torch.from_numpy(flat).float().view(shape)
        weight, bias = values[:-1], values[-1]
        log_p = (offset + torch.addmm(bias, x, weight)).log_softmax(1)
        value = -(log_p.gather(1, codes) * shares).sum() + penalty / 2 * weight.square().sum()
        error = log_p.exp_() * shares
        error.scatter_add_(1, codes, -shares)
        slope = torch.cat([torch.addmm(weight, x.T, error, beta=penalty), error.sum(0, keepdim=True)])
        return float(value), slope.flatten().double().numpy()

    first = np.zeros(shape[0] * shape[1]) if start is None else start.flatten().numpy()
    with torch.inference_mode(False), torch.no_grad(), full_precision(x.device):
        found = minimize(objective, first, jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return torch.from_numpy(found.x).view(shape)
