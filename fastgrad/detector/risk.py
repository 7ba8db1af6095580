"""Risk: the probability that the answer is wrong, from its own probability and the evidence against its input.

An answer is wrong because the network is unsure of it, or because the input misleads the network. The risk is a
noisy-or (Pearl, *Probabilistic Reasoning in Intelligent Systems*, 1988) of these two causes,

    risk = 1 - p (1 - m),    m = sigmoid(b + sum_s w_s e_s),    w_s >= 0

where p is the largest probability and e_s the evidence of source s. So the risk is never below 1 - p, and no evidence
lowers it. The evidence of the challenge classifier is replaced by log(1 + o / `FLOOR`), where o are the odds of
sum_k q_k r_k: q_k is the probability that the input is a challenge of kind k, r_k the share of wrong answers to that
kind. Kinds differ: nearly all answers to attacks are wrong, few to brighter images. b and w minimise
``||w||^2 / (2 n)`` plus the mean negative log likelihood on n clean inputs and challenges, which have equal total
weights. A challenge keeps the label of its clean input, because it does not change what is shown.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from fastgrad.detector.constants import FLOOR, RISK_STEPS
from fastgrad.losses import compute_dtype
from fastgrad.scores.fitted import Fitted
from fastgrad.scores.softmax_regression import equal_shares
from fastgrad.scores.temperature import Temperature


class NoisyOr(Fitted):
    """P(event) from a cause of prior probability, and the evidence for another."""

    weight: Tensor  # (S,)
    bias: Tensor  # ()

    @classmethod
    def fit(cls, prior: Tensor | None, evidence: Tensor, event: Tensor, challenging: Tensor) -> NoisyOr:
        """Maximise the penalised likelihood; without challenges, the evidence has no effect.

        ``prior`` ``(n,)`` is the probability of the other cause; None means a logistic regression on the evidence. The
        ``evidence`` ``(n, S)`` of an input comes from a fit without it and its source.
        """
        count = evidence.shape[1]
        if not challenging.any():
            return cls(weight=evidence.new_zeros(count), bias=evidence.new_tensor(-torch.inf))
        other = evidence.new_zeros(len(evidence)) if prior is None else prior
        usable = evidence.isfinite().all(1)
        other, evidence, event, challenging = (v[usable] for v in (other, evidence, event, challenging))
        rows = torch.cat([evidence, torch.ones_like(evidence[:, :1])], 1)
        shares = equal_shares(challenging)

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
        """Return log odds ``(B,)`` by the evidence alone; infinite if some evidence is not finite."""
        return torch.where(evidence.isfinite().all(1), evidence @ self.weight + self.bias, torch.inf)

    def forward(self, prior: Tensor, evidence: Tensor) -> Tensor:
        """Return probabilities ``(B,)`` from ``prior`` ``(B,)`` and ``evidence`` ``(B, S)``; 1 instead of NaN."""
        p = prior + (1 - prior) * torch.sigmoid(self.log_odds(evidence))
        return p.nan_to_num(1.0)


class Risk(Fitted):
    """P(wrong) from the answer's own doubt and the evidence against its input.

    ``options["wrong_above"]`` is the risk above which as many answers to clean inputs are as were wrong
    (`fastgrad.deploy.error_rate`); None without challenges.
    """

    rates: Tensor  # (C,), the share of wrong answers to each kind of challenge, 0 for "clean"; C is 0 without any
    cause: NoisyOr

    @classmethod
    def fit(cls, doubt: Tensor, evidence: Tensor, log_p: Tensor, wrong: Tensor, kinds: Tensor) -> Risk:
        """Fit on n clean inputs, of kind 0, and challenges.

        ``doubt`` is 1 minus the largest probability; ``wrong`` says whether the answer is wrong. ``evidence``
        ``(n, S)`` and ``log_p`` ``(n, C)`` of kinds come from fits without the input and its source.
        """
        classes = log_p.shape[1]
        counts, errors = (torch.bincount(kinds[rows], minlength=classes)[:classes] for rows in (kinds >= 0, wrong))
        # Laplace's rule keeps a few inputs from making a rate 0 or 1.
        rates = (torch.arange(classes, device="cpu") > 0) * (errors + 1).to(evidence.dtype) / (counts + 2)
        risk = cls(rates=rates, cause=NoisyOr.fit(doubt, misleading(evidence, log_p, rates), wrong, kinds > 0))
        clean, share = kinds == 0, wrong[kinds == 0].double().mean()
        above = risk(doubt, evidence, log_p)[clean].double().quantile(1 - share)
        risk.options["wrong_above"] = float(above) if classes else None
        return risk

    def forward(self, doubt: Tensor, evidence: Tensor, log_p: Tensor) -> Tensor:
        """Return probabilities ``(B,)`` from ``(B,)``, ``(B, S)`` and ``(B, C)``; 1 instead of NaN."""
        p: Tensor = self.cause(doubt, misleading(evidence, log_p, self.rates))
        return p

    def raised(self, doubt: Tensor, evidence: Tensor, log_p: Tensor) -> Tensor:
        """Return by how much each source raises the risk, ``(B, S)``: the risk minus that without its evidence."""
        evidence = misleading(evidence, log_p, self.rates)
        columns = torch.arange(evidence.shape[1], device=evidence.device)
        without = [self.cause(doubt, torch.where(columns == k, 0.0, evidence)) for k in range(len(columns))]
        p: Tensor = self.cause(doubt, evidence)
        return p.unsqueeze(1) - torch.stack(without, 1)


def misleading(evidence: Tensor, log_p: Tensor, rates: Tensor) -> Tensor:
    """Return ``evidence`` ``(B, S)`` with the classifier's replaced by log(1 + odds of an error by kinds / `FLOOR`)."""
    if not len(rates):
        return evidence
    wrong = log_p.exp() @ rates
    return torch.cat([evidence[:, :-1], (wrong / (1 - wrong) / FLOOR).log1p().unsqueeze(1)], 1)


def tempered(logits: Tensor, temperature: Temperature | None) -> Tensor:
    """Return ``logits`` ``(B, N)`` in at least float32, divided by the temperature if there is one."""
    precise = logits.to(compute_dtype(logits.dtype))
    return precise if temperature is None else temperature(precise)


def doubt(log_probabilities: Tensor) -> Tensor:
    """Return the sum of all probabilities but the largest, ``(B,)``, float64, from ``(B, N)``: exact even if tiny."""
    log_p = log_probabilities.double()
    others = torch.arange(log_p.shape[1], device=log_p.device) != log_p.argmax(-1, keepdim=True)
    return torch.where(others, log_p, -torch.inf).logsumexp(-1).exp()
