"""Risk: the probability that the answer is wrong, from its own probability and the evidence against its input.

An answer is wrong because the network is unsure of it, or because the input misleads the network, whichever it is: a
noisy-or (Pearl, *Probabilistic Reasoning in Intelligent Systems*, 1988) of two causes,

    risk = 1 - p (1 - m),    m = sigmoid(b + sum_s w_s log(1 + e_s)),    w_s >= 0

p the largest probability, e_s the evidence of source s. So risk is 1 - p where nothing is unusual, and no evidence ever
lowers it. w and b are those of largest likelihood on clean inputs and challenges, both weighing the same in all. A
challenge keeps the label of the clean input that it is made from: it does not change what is seen.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.detector.constants import RISK_STEPS
from fastgrad.scores.fitted import Fitted


class NoisyOr(Fitted):
    """P(event) from a cause of known probability, and the evidence for another.

    With a known probability of 0 it is a logistic regression of the evidence. Buffers: ``weight`` ``(S,)``, ``bias``
    ``()``.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, known: Tensor, evidence: Tensor, event: Tensor, challenging: Tensor) -> NoisyOr:
        """Maximise the likelihood; without challenges the evidence counts nothing.

        Args:
            known: ``(n,)``, the probability of the other cause.
            evidence: ``(n, S)``, of each input by what was fitted without it and its source.
            event: ``(n,)`` of bool.
            challenging: ``(n,)`` of bool.
        """
        from scipy.optimize import minimize

        count = evidence.shape[1]
        if not challenging.any():
            return cls(weight=evidence.new_zeros(count), bias=evidence.new_tensor(-torch.inf))
        usable = evidence.isfinite().all(1)
        known, evidence, event, challenging = (v[usable] for v in (known, evidence, event, challenging))
        rows = torch.cat([evidence.log1p(), torch.ones_like(evidence[:, :1])], 1)
        shares = torch.where(challenging, 0.5 / challenging.sum(), 0.5 / (~challenging).sum())

        def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            values = torch.from_numpy(flat)
            misled = torch.sigmoid(rows @ values)
            p = (known + (1 - known) * misled).clamp(1e-12, 1 - 1e-12)
            loss = -(shares * torch.where(event, p.log(), (1 - p).log())).sum()
            error = shares * torch.where(event, -(1 - p) * misled / p, misled)
            penalty = values * torch.cat([torch.ones(count), torch.zeros(1)]) / len(rows)
            return float(loss + penalty @ values / 2), (rows.T @ error + penalty).numpy()

        with torch.inference_mode(False), torch.no_grad():
            found = minimize(
                objective,
                np.zeros(count + 1),
                jac=True,
                method="L-BFGS-B",
                bounds=[(0, None)] * count + [(None, None)],
                options={"maxiter": RISK_STEPS},
            )
        values = torch.from_numpy(found.x)
        return cls(weight=values[:-1].contiguous(), bias=values[-1].contiguous())

    def log_odds(self, evidence: Tensor) -> Tensor:
        """Log odds ``(B,)`` by the evidence alone; infinite where some is no finite number."""
        odds = evidence.log1p() @ self.weight + self.bias
        return torch.where(evidence.isfinite().all(1), odds, torch.inf)

    def forward(self, known: Tensor, evidence: Tensor) -> Tensor:
        """Probabilities ``(B,)`` from ``known`` ``(B,)`` and ``evidence`` ``(B, S)``; 1 where one is no number."""
        p = known + (1 - known) * torch.sigmoid(self.log_odds(evidence))
        return torch.where(p.isnan(), 1.0, p)

    def raised(self, known: Tensor, evidence: Tensor) -> Tensor:
        """By how much each source raises the probability ``(B, S)``: without its evidence it would be so much less."""
        columns = torch.arange(evidence.shape[1], device=evidence.device)
        without = [self(known, torch.where(columns == k, 0.0, evidence)) for k in range(len(columns))]
        p: Tensor = self(known, evidence)
        return p.unsqueeze(1) - torch.stack(without, 1)


def doubt(log_probabilities: Tensor) -> Tensor:
    """The sum of all probabilities but the largest ``(B,)``, float64, from ``(B, N)``: exact where it is tiny, too."""
    log_p = log_probabilities.double()
    others = torch.arange(log_p.shape[1], device=log_p.device) != log_p.argmax(-1, keepdim=True)
    return torch.where(others, log_p, -torch.inf).logsumexp(-1).exp()
