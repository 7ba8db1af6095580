"""Risk: the probability that the answer is wrong, from its own probability and the evidence against its input.

An answer is wrong because the network is unsure of it, or because the input misleads the network, whichever it is: a
noisy-or (Pearl, *Probabilistic Reasoning in Intelligent Systems*, 1988) of two causes,

    risk = 1 - p (1 - m),    m = sigmoid(b + sum_s w_s log(1 + e_s) + v c log(1 + e_challenges)),    w_s, v >= 0

p the largest probability, c = log(p / (1 - p)) how certain the answer is, at least 0, e_s the evidence of source s. So
risk is 1 - p where nothing is unusual, and no evidence ever lowers it. What resembles challenges counts more against a
certain answer: a foreign or blurred input leaves the network unsure, an attack makes it certain. b, v and w are those
of largest likelihood on clean inputs and challenges, both weighing the same in all. A challenge keeps the label of the
clean input that it is made from: it does not change what is seen.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.detector.constants import CERTAINTY, RISK_STEPS
from fastgrad.scores.fitted import Fitted


class NoisyOr(Fitted):
    """P(event) from a cause of known probability, and the evidence for another.

    Buffers: ``weight`` ``(S,)``, ``bias`` ``()``, and ``certain`` ``()``, by which the weight of the last source rises
    with the certainty that the known cause is absent.
    """

    weight: Tensor
    certain: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, known: Tensor | None, evidence: Tensor, event: Tensor, challenging: Tensor) -> NoisyOr:
        """Maximise the likelihood; without challenges the evidence counts nothing.

        Args:
            known: ``(n,)``, the probability of the other cause. None: there is none, and this is a logistic regression
                of the evidence.
            evidence: ``(n, S)``, of each input by what was fitted without it and its source; the classifier of
                challenges comes last.
            event: ``(n,)`` of bool.
            challenging: ``(n,)`` of bool.
        """
        from scipy.optimize import minimize

        count = evidence.shape[1]
        if not challenging.any():
            nothing = evidence.new_zeros(count + 1)
            return cls(weight=nothing[1:], certain=nothing[0], bias=evidence.new_tensor(-torch.inf))
        other = evidence.new_zeros(len(evidence)) if known is None else known
        certainty = torch.zeros_like(other) if known is None else certainty_of(other)
        usable = evidence.isfinite().all(1)
        other, certainty, evidence, event, challenging = (
            v[usable] for v in (other, certainty, evidence, event, challenging)
        )
        amounts = evidence.log1p()
        rows = torch.cat([amounts, certainty.unsqueeze(1) * amounts[:, -1:], torch.ones_like(amounts[:, :1])], 1)
        shares = torch.where(challenging, 0.5 / challenging.sum(), 0.5 / (~challenging).sum())

        def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            values = torch.from_numpy(flat)
            misled = torch.sigmoid(rows @ values)
            p = (other + (1 - other) * misled).clamp(1e-12, 1 - 1e-12)
            loss = -(shares * torch.where(event, p.log(), (1 - p).log())).sum()
            error = shares * torch.where(event, -(1 - p) * misled / p, misled)
            penalty = values * torch.cat([torch.ones(count + 1), torch.zeros(1)]) / len(rows)
            return float(loss + penalty @ values / 2), (rows.T @ error + penalty).numpy()

        with torch.inference_mode(False), torch.no_grad():
            found = minimize(
                objective,
                np.zeros(count + 2),
                jac=True,
                method="L-BFGS-B",
                bounds=[(0, None)] * (count + 1) + [(None, None)],
                options={"maxiter": RISK_STEPS},
            )
        values = torch.from_numpy(found.x)
        return cls(weight=values[:count], certain=values[count], bias=values[-1])

    def log_odds(self, evidence: Tensor, certainty: Tensor | None = None) -> Tensor:
        """Log odds ``(B,)`` by the evidence alone; infinite where some is no finite number."""
        amounts = evidence.log1p()
        odds = amounts @ self.weight + self.bias
        if certainty is not None:
            odds = odds + self.certain * certainty * amounts[:, -1]
        return torch.where(evidence.isfinite().all(1), odds, torch.inf)

    def forward(self, known: Tensor, evidence: Tensor) -> Tensor:
        """Probabilities ``(B,)`` from ``known`` ``(B,)`` and ``evidence`` ``(B, S)``; 1 where one is no number."""
        p = known + (1 - known) * torch.sigmoid(self.log_odds(evidence, certainty_of(known)))
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


def certainty_of(doubt: Tensor) -> Tensor:
    """Log odds ``(B,)`` that an answer is right by itself, from 0 to 20, over `CERTAINTY`."""
    return (torch.log1p(-doubt) - doubt.log()).clamp(0, 20) / CERTAINTY
