"""The challenge classifier: one multinomial logistic regression of clean inputs and kinds of challenge.

Its score is minus the log probability of "clean". It detects challenges better if it learns their kinds than if it
learns two classes. Clean and challenging samples have the same total weight. The weights of a linear map can be read,
and the objective has one minimum, so that nothing depends on a seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from fastgrad.detector.constants import INVERSE_PENALTY, LIMIT, STEPS
from fastgrad.ops.dispatch import full_precision
from fastgrad.scores.fitted import Fitted, FittedList
from fastgrad.scores.rows import clipped


class JointRows(Fitted):
    """Rows of several blocks side by side, ``(B, d)``."""

    parts: FittedList

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return standardised rows, clipped at 50 standard deviations."""
        return clipped(torch.cat([rows(blocks) for rows in self.parts], -1), LIMIT)


class ChallengeClassifier(Fitted):
    """Log probabilities of a linear map to classes, of which the first is "clean"."""

    weight: Tensor  # (d, C)
    bias: Tensor  # (C,)

    @classmethod
    def fit(cls, rows: Tensor, kinds: NDArray[np.intp], classes: int, *, steps: int = STEPS) -> ChallengeClassifier:
        """Minimise the weighted cross-entropy plus ``||W||^2 / (2 c n)`` of rows ``(n, d)``; c is `INVERSE_PENALTY`.

        ``kinds`` ``(n,)`` are 0 for clean samples and other numbers for challenges; both must occur. Those of the C
        ``classes`` that do not occur get probability 0. Products are in float32: L-BFGS (Liu and Nocedal, "On the
        limited memory BFGS method for large scale optimization", 1989) ends long before their rounding matters.
        """
        codes = torch.from_numpy(kinds).unsqueeze(1)
        challenging = (codes > 0).float()
        shares = torch.where(codes > 0, 0.5 / challenging.sum(), 0.5 / (1 - challenging).sum())
        absent = torch.where(torch.bincount(codes[:, 0], minlength=classes) == 0, -torch.inf, shares.new_zeros(()))
        x = rows.detach().float().contiguous()
        shape = (x.shape[1] + 1, classes)
        decay = 1 / (INVERSE_PENALTY * len(x))

        def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            values = torch.from_numpy(flat).float().view(shape)
            weight, bias = values[:-1], values[-1]
            log_p = torch.addmm(bias + absent, x, weight).log_softmax(1)
            value = -(log_p.gather(1, codes) * shares).sum() + decay / 2 * weight.square().sum()
            error = log_p.exp_() * shares
            error.scatter_add_(1, codes, -shares)
            slope = torch.cat([torch.addmm(weight, x.T, error, beta=decay), error.sum(0, keepdim=True)])
            return float(value), slope.flatten().double().numpy()

        with torch.inference_mode(False), torch.no_grad(), full_precision(x.device):
            start = np.zeros(shape[0] * shape[1])
            found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": steps})
        values = torch.from_numpy(found.x).view(shape)
        return cls(weight=values[:-1].contiguous(), bias=values[-1] + absent)

    def forward(self, rows: Tensor) -> Tensor:
        """Return log probabilities ``(B, C)`` of ``rows`` ``(B, d)``."""
        return torch.log_softmax(rows @ self.weight + self.bias, -1)
