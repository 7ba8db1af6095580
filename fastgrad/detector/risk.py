"""Risk: the probability that the answer is wrong, from its own probability and the evidence against its input.

An answer is wrong because the network is unsure of it, or because the input misleads the network, whichever it is: a
noisy-or (Pearl, *Probabilistic Reasoning in Intelligent Systems*, 1988) of two causes,

    risk = 1 - p (1 - m),    m = sigmoid(b + sum_s w_s e_s),    w_s >= 0

p the largest probability, e_s the evidence of source s. So risk is never below 1 - p, and no evidence lowers it. In
place of the classifier's evidence stands log(1 + o / `FLOOR`), o the odds of sum_k q_k r_k: q_k the probability that
the input is a challenge of kind k, r_k the share of these that the network answers wrongly. Kinds differ: of attacks
nearly all are, of brighter images few. b and w minimise ``||w||^2 / (2 n)`` plus the mean of minus the log likelihood
on n clean inputs and challenges, both weighing the same in all. A challenge keeps the label of the clean input that it
is made from: it does not change what is seen.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from fastgrad.detector.constants import FLOOR, RISK_STEPS
from fastgrad.scores.fitted import Fitted


class NoisyOr(Fitted):
    """P(event) from a cause of known probability, and the evidence for another."""

    weight: Tensor  # (S,)
    bias: Tensor  # ()

    @classmethod
    def fit(cls, known: Tensor | None, evidence: Tensor, event: Tensor, challenging: Tensor) -> NoisyOr:
        """Maximise the penalised likelihood; without challenges the evidence counts nothing.

        ``known`` ``(n,)`` is the probability of the other cause; None makes a logistic regression of the ``evidence``
        ``(n, S)``, which is of each input by what was fitted without it and its source.
        """
        count = evidence.shape[1]
        if not challenging.any():
            return cls(weight=evidence.new_zeros(count), bias=evidence.new_tensor(-torch.inf))
        other = evidence.new_zeros(len(evidence)) if known is None else known
        usable = evidence.isfinite().all(1)
        other, evidence, event, challenging = (v[usable] for v in (other, evidence, event, challenging))
        rows = torch.cat([evidence, torch.ones_like(evidence[:, :1])], 1)
        shares = torch.where(challenging, 0.5 / challenging.sum().double(), 0.5 / (~challenging).sum().double())

        def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            values = torch.from_numpy(flat)
            misled = torch.sigmoid(rows @ values)
            p = (other + (1 - other) * misled).clamp(1e-12, 1 - 1e-12)
            loss = -(shares * torch.where(event, p.log(), (1 - p).log())).sum()
            error = shares * torch.where(event, -(1 - p) * misled / p, misled)
            penalty = torch.cat([values[:-1], values.new_zeros(1)]) / len(rows)
            return float(loss + penalty @ values / 2), (rows.T @ error + penalty).numpy()

        start, bounds = np.zeros(count + 1), [(0, None)] * count + [(None, None)]
        with torch.inference_mode(False), torch.no_grad():
            found = minimize(
                objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": RISK_STEPS}
            )
        values = torch.from_numpy(found.x)
        return cls(weight=values[:count], bias=values[-1])

    def log_odds(self, evidence: Tensor) -> Tensor:
        """Log odds ``(B,)`` by the evidence alone; infinite where some is not finite."""
        return torch.where(evidence.isfinite().all(1), evidence @ self.weight + self.bias, torch.inf)

    def forward(self, known: Tensor, evidence: Tensor) -> Tensor:
        """Probabilities ``(B,)`` from ``known`` ``(B,)`` and ``evidence`` ``(B, S)``; 1 where one is no number."""
        p = known + (1 - known) * torch.sigmoid(self.log_odds(evidence))
        return torch.where(p.isnan(), 1.0, p)


class Risk(Fitted):
    """P(wrong) from the answer's own doubt and the evidence against its input."""

    rates: Tensor  # (C,), the share of wrong answers to each kind of challenge, 0 of "clean"; C is 0 without any
    cause: NoisyOr

    @classmethod
    def fit(cls, doubt: Tensor, evidence: Tensor, log_p: Tensor, wrong: Tensor, kinds: Tensor) -> Risk:
        """Fit on n clean inputs, of kind 0, and challenges.

        ``doubt`` is 1 less the largest probability, ``wrong`` whether the answer is. ``evidence`` ``(n, S)`` and
        ``log_p`` ``(n, C)`` of kinds are by what was fitted without the input and its source.
        """
        classes = log_p.shape[1]
        counts, errors = (torch.bincount(kinds[rows], minlength=classes)[:classes] for rows in (kinds >= 0, wrong))
        # By Laplace's rule, so that few inputs make nothing certain.
        rates = (torch.arange(classes, device="cpu") > 0) * (errors + 1).to(evidence.dtype) / (counts + 2)
        return cls(rates=rates, cause=NoisyOr.fit(doubt, misleading(evidence, log_p, rates), wrong, kinds > 0))

    def forward(self, doubt: Tensor, evidence: Tensor, log_p: Tensor) -> Tensor:
        """Probabilities ``(B,)`` from ``(B,)``, ``(B, S)`` and ``(B, C)``; 1 where one is no number."""
        p: Tensor = self.cause(doubt, misleading(evidence, log_p, self.rates))
        return p

    def raised(self, doubt: Tensor, evidence: Tensor, log_p: Tensor) -> Tensor:
        """By how much each source raises the risk ``(B, S)``: without its evidence it would be so much less."""
        evidence = misleading(evidence, log_p, self.rates)
        columns = torch.arange(evidence.shape[1], device=evidence.device)
        without = [self.cause(doubt, torch.where(columns == k, 0.0, evidence)) for k in range(len(columns))]
        p: Tensor = self.cause(doubt, evidence)
        return p.unsqueeze(1) - torch.stack(without, 1)


def misleading(evidence: Tensor, log_p: Tensor, rates: Tensor) -> Tensor:
    """``evidence`` ``(B, S)`` with the odds of an error, as kinds of challenge go, in place of the classifier's."""
    if not len(rates):
        return evidence
    wrong = log_p.exp() @ rates
    return torch.cat([evidence[:, :-1], (wrong / (1 - wrong) / FLOOR).log1p().unsqueeze(1)], 1)


def doubt(log_probabilities: Tensor) -> Tensor:
    """The sum of all probabilities but the largest ``(B,)``, float64, from ``(B, N)``: exact where it is tiny, too."""
    log_p = log_probabilities.double()
    others = torch.arange(log_p.shape[1], device=log_p.device) != log_p.argmax(-1, keepdim=True)
    return torch.where(others, log_p, -torch.inf).logsumexp(-1).exp()
