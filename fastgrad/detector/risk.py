"""Risk: the probability that the answer is wrong, from the answer's own confidence and the evidence against its input.

By the law of total probability, x being clean or a challenge:

    P(wrong | x) = P(clean | x) P(wrong | x, clean) + P(challenge | x) P(wrong | x, challenge)

Each of the three is a logistic regression: of evidence, whether x is a challenge; on clean inputs, of the confidence
alone; on challenges, of confidence and evidence. Challenges keep the label of the clean input that they are made from:
an attack or a corruption does not change what is seen. So where nothing is unusual the risk ranks as the answer's own
probabilities do, and where much is, it follows the evidence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrad.detector.constants import INVERSE_PENALTY, RISK_STEPS
from fastgrad.detector.logistic import logistic_regression
from fastgrad.scores.fitted import Fitted

#: Log odds of a largest probability are cut here: what is beyond is one answer.
_LARGEST = 50.0


class LogOdds(Fitted):
    """Log odds ``(B,)``, linear in rows ``(B, d)``; buffers ``weight`` ``(d,)`` and ``bias`` ``()``."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, rows: Tensor, positive: Tensor, *, balanced: bool = False) -> LogOdds:
        """Logistic regression on standardised columns.

        Args:
            rows: ``(n, d)``.
            positive: ``(n,)`` of bool.
            balanced: Whether both sides weigh the same in all.
        """
        shares = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
        if balanced:
            for side in (positive, ~positive):
                shares[side] = 0.5 / max(1, int(side.sum()))
        mean = shares @ rows
        spread = (shares @ (rows - mean).square()).sqrt()
        scale = torch.where(spread > 0, spread, torch.ones_like(spread))
        weight, bias = logistic_regression(
            (rows - mean) / scale, positive.long(), shares, INVERSE_PENALTY, RISK_STEPS, classes=2
        )
        slope = (weight[:, 1] - weight[:, 0]) / scale
        return cls(weight=slope, bias=bias[1] - bias[0] - slope @ mean)

    def forward(self, rows: Tensor) -> Tensor:
        """Log odds of ``rows``."""
        return rows @ self.weight + self.bias


class Risk(Fitted):
    """The mixture; children ``challenge`` (of evidence), ``clean`` (of confidence), ``challenged`` (of both)."""

    challenge: LogOdds
    clean: LogOdds
    challenged: LogOdds

    @classmethod
    def fit(cls, confidence: Tensor, evidence: Tensor, wrong: Tensor, challenging: Tensor) -> Risk:
        """From answers with labels; without challenges among them, of the confidence alone.

        Args:
            confidence: ``(n,)`` of `confidence_of`.
            evidence: ``(n, S)``, of each answer by what was fitted without it and its source.
            wrong: ``(n,)`` of bool.
            challenging: ``(n,)`` of bool.
        """
        own, both = confidence.unsqueeze(1), torch.cat([confidence.unsqueeze(1), evidence], 1)
        usual = LogOdds.fit(own[~challenging], wrong[~challenging])
        if not challenging.any():
            never = LogOdds(weight=torch.zeros_like(evidence[0]), bias=evidence.new_tensor(-torch.inf))
            nothing = LogOdds(weight=torch.zeros_like(both[0]), bias=evidence.new_zeros(()))
            return cls(challenge=never, clean=usual, challenged=nothing)
        return cls(
            challenge=LogOdds.fit(evidence, challenging, balanced=True),
            clean=usual,
            challenged=LogOdds.fit(both[challenging], wrong[challenging]),
        )

    def forward(self, confidence: Tensor, evidence: Tensor) -> Tensor:
        """Probabilities ``(B,)`` from ``confidence`` ``(B,)`` and ``evidence`` ``(B, S)``; 1 where one is no number."""
        own = confidence.unsqueeze(1)
        unusual = torch.sigmoid(self.challenge(evidence))
        usual = torch.sigmoid(self.clean(own))
        risk = (1 - unusual) * usual + unusual * torch.sigmoid(self.challenged(torch.cat([own, evidence], 1)))
        finite = confidence.isfinite() & evidence.isfinite().all(1)
        return torch.where(finite, risk, 1.0)

    def raised(self, confidence: Tensor, evidence: Tensor) -> Tensor:
        """By how much each source raises the risk ``(B, S)``: without its evidence the risk would be so much less."""
        risk: Tensor = self(confidence, evidence)
        without = [
            self(
                confidence,
                torch.where(torch.arange(evidence.shape[1], device=evidence.device) == k, 0.0, evidence),
            )
            for k in range(evidence.shape[1])
        ]
        return risk.unsqueeze(1) - torch.stack(without, 1)


def confidence_of(log_probabilities: Tensor) -> Tensor:
    """Log odds ``(B,)`` of the largest probability, float64, from ``(B, N)``, N at least 2."""
    log_p = log_probabilities.double()
    others = torch.arange(log_p.shape[1], device=log_p.device) != log_p.argmax(-1, keepdim=True)
    rest = torch.where(others, log_p, -torch.inf).logsumexp(-1)
    return (log_p.amax(-1) - rest).clamp(-_LARGEST, _LARGEST)
