"""Multinomial logistic regression with weighted samples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def logistic_regression(
    rows: Tensor, codes: Tensor, shares: Tensor, inverse_penalty: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Weights ``(d, C)`` and biases ``(C,)``, float64, that minimise ``sum_i shares_i NLL_i + ||W||^2 / (2 c n)``.

    The objective is convex, so that no seed decides anything. Its products are in float32: L-BFGS (Liu and Nocedal, "On
    the limited memory BFGS method for large scale optimization", 1989) ends long before their rounding matters.

    Args:
        rows: ``(n, d)``, standardised.
        codes: ``(n,)``, classes from 0 on.
        shares: ``(n,)``, the weight of each sample; they add up to 1.
        inverse_penalty: c.
        steps: At most.
    """
    from scipy.optimize import minimize

    x, shares, count = rows.detach().float().contiguous(), shares.float().unsqueeze(1), len(rows)
    width = (x.shape[1], int(codes.max()) + 1)
    own = codes.unsqueeze(1)
    decay = 1 / (inverse_penalty * count)

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        values = torch.from_numpy(flat).float().view(width[0] + 1, width[1])
        weight, bias = values[:-1], values[-1]
        log_p = torch.addmm(bias, x, weight).log_softmax(1)
        value = -(log_p.gather(1, own) * shares).sum() + decay / 2 * weight.square().sum()
        error = log_p.exp_() * shares
        error.scatter_add_(1, own, -shares)
        slope = torch.cat([torch.addmm(weight, x.T, error, beta=decay), error.sum(0, keepdim=True)])
        return float(value), slope.flatten().double().numpy()

    with torch.inference_mode(False), torch.no_grad():
        start = np.zeros((width[0] + 1) * width[1])
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": steps})
    values = torch.from_numpy(found.x).view(width[0] + 1, width[1])
    return values[:-1].contiguous(), values[-1].contiguous()
