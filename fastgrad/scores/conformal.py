"""Conformal p-values: what a score means, measured on clean data that took no part in fitting it.

A score s has the p-value "share of clean calibration samples that score at least s". If the calibration
samples and a new clean sample are exchangeable, that p-value is at most a with probability at most a,
whatever the score (Vovk, Gammerman and Shafer, 2005). All p-values are kept as logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .fitted import Fitted

#: Largest fall of log p over the width of the middle half of the calibration scores. Beyond 5 %, a normal
#: distribution falls by 2.8 to 4.5 (at one in a thousand) over that width, an exponential one by 1.1 everywhere.
STEEPEST = 4.0


def _spread(ordered: Tensor) -> float:
    """Width of the middle half of sorted scores; of all of them, or one, where that is nothing."""
    n = len(ordered)
    middle = float(ordered[(3 * n) // 4] - ordered[n // 4]) if n > 1 else 0.0
    return middle or float(ordered[-1] - ordered[0]) or 1.0


class UpperTail(Fitted):
    """Natural logarithm of the conformal p-value of a score, large scores being unusual.

    Between calibration scores the logarithm is interpolated, never below the conformal one, so that it stays
    strictly monotone. Beyond the highest scores, a share ``tail`` of them, an exponential takes over: it
    keeps the order of extreme values, which counting cannot.

    The slope of the logarithm is limited (`STEEPEST`), by raising p-values, never by lowering them. Calibration
    scores that happen to lie close together would else make a cliff, where the rounding of the network's float32
    arithmetic shows in the p-value; so would a tail of a few such scores.
    """

    scores: Tensor
    log_p: Tensor
    start: Tensor
    start_log_p: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, scores: Tensor, tail: float = 0.05) -> UpperTail:
        """From calibration ``scores`` ``(n,)``; beyond the share ``tail`` in (0, 1) the exponential holds."""
        ordered = torch.sort(scores.double()).values
        n = len(ordered)
        steepest = STEEPEST / _spread(ordered)
        # Score i of n (from 0) has n - i scores at or above it; one more for the sample in question.
        log_p = torch.log(torch.arange(n + 1, 1, -1, dtype=torch.float64) / (n + 1))
        # The lowest map above this one that falls nowhere faster.
        line = steepest * (ordered - ordered[n // 2])
        # Adding and subtracting a long line rounds: never below the conformal value for that.
        log_p = torch.maximum(log_p, torch.cummax(log_p + line, 0).values - line)
        first = min(n - 1, max(0, n - max(1, math.ceil(tail * n))))
        excess = ordered[first + 1 :] - ordered[first]
        scale = torch.clamp(excess.mean() if len(excess) else ordered.new_zeros(()), min=1 / steepest)
        # Of tied scores the first counts all the others.
        start_log_p = log_p[int(torch.searchsorted(ordered, ordered[first]))]
        return cls(scores=ordered, log_p=log_p, start=ordered[first], start_log_p=start_log_p, scale=scale)

    def forward(self, scores: Tensor) -> Tensor:
        """Log p-values ``(B,)`` of ``scores`` ``(B,)``."""
        scores = scores.double()
        last = self.scores.shape[0] - 1
        upper = torch.searchsorted(self.scores, scores.contiguous()).clamp(max=last)
        lower = (upper - 1).clamp(min=0)
        low, high = self.scores[lower], self.scores[upper]
        share = ((scores - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        body = self.log_p[lower] + share * (self.log_p[upper] - self.log_p[lower])
        tail = self.start_log_p - (scores - self.start) / self.scale
        return torch.where(scores > self.start, tail, body)


class OneSided(Fitted):
    """Log p-value of a score that is suspicious when high."""

    upper: UpperTail

    @classmethod
    def fit(cls, scores: Tensor, tail: float = 0.05) -> OneSided:
        """From calibration ``scores`` ``(n,)``."""
        return cls(upper=UpperTail.fit(scores, tail))

    def forward(self, scores: Tensor) -> Tensor:
        """Log p-values ``(B,)``."""
        result: Tensor = self.upper(scores)
        return result


class TwoSided(Fitted):
    """Log of the typicality 2 min(p, 1 - p): too good to be true is as suspicious as too bad.

    An attack that overshoots makes a network more certain than any clean image does; one-sided, confidence
    and energy call it safe.
    """

    upper: UpperTail
    lower: UpperTail

    @classmethod
    def fit(cls, scores: Tensor, tail: float = 0.05) -> TwoSided:
        """From calibration ``scores`` ``(n,)``."""
        return cls(upper=UpperTail.fit(scores, tail), lower=UpperTail.fit(-scores, tail))

    def forward(self, scores: Tensor) -> Tensor:
        """Log typicalities ``(B,)``, at most 0."""
        smaller = torch.minimum(self.upper(scores), self.lower(-scores))
        return (smaller + math.log(2.0)).clamp(max=0.0)


def fisher(log_p: Tensor, cap: float, weights: Sequence[float]) -> Tensor:
    """Weighted sum of -log p, each at most ``cap``: ``(B, K)`` to ``(B,)`` (Fisher's method)."""
    return ((-log_p).clamp(max=cap) * log_p.new_tensor(weights)).sum(-1)


def harmonic(log_p: Tensor, cap: float, weights: Sequence[float]) -> Tensor:
    """Minus the log of the p-values' weighted harmonic mean, each at least exp(-``cap``)."""
    log_shares = torch.log(log_p.new_tensor(weights) / sum(weights))
    return torch.logsumexp((-log_p).clamp(max=cap) + log_shares, -1)


COMBINATIONS = {"fisher": fisher, "harmonic": harmonic}
