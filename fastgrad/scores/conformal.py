"""Conformal p-values: what a score means, measured on clean data that took no part in fitting it.

Of n calibration scores and a new clean one, all exchangeable, the new one lies above the k-th highest with probability
``k / (n + 1)``, or less where scores are equal, whatever the score (Vovk, Gammerman and Shafer, "Algorithmic learning
in a random world", 2005). So that is the p-value of the k-th highest score. Where every score is counted, a share of at
most a of clean samples has p-values below a, on average over calibration sets, for every multiple a of ``1 / (n + 1)``;
it is a unless scores lie close together. Elsewhere that is so by interpolation. The share has a Beta distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgrad.scores.fitted import Fitted

#: Largest fall of log p over the width of the middle half of the calibration scores. Beyond 5 %, a normal
#: distribution falls by 2.8 to 4.5 (at one in a thousand) over that width, an exponential one by 1.1 everywhere.
STEEPEST = 8.0
#: Fall of log p from one score at which it is counted to the next, or of p in units of a fifth: the same at a fifth.
_STEP = 0.25
#: The highest scores, so many or a tenth if that is fewer, are described by their mean instead of counted.
_TAIL = 10
#: Share of a two-sided score's false alarms that small values have. Few inputs are unusual by them, but far out. AUROC
#: on EfficientNet-Lite0, and of attacks without challenges: half .889 and .920, .05 .893 and .918, none .890 and .814.
SMALL = 0.05


class PValues(Fitted):
    """Natural logarithms of the p-values of K scores, large ones being unusual, and of some of them small ones, too.

    In the body p is counted at every score, or at scores that are a few ranks apart, and the logarithm interpolated:
    strictly monotone, without cliffs between close scores, where the network's rounding would show in the p-value.

    Beyond the k-th highest score s, or beyond the highest where all are counted, the counts are too small to tell
    extreme values apart. k is 10, or a tenth of the scores if that is fewer, but at least 2; e is the mean excess of
    the k highest over the next one. Were excesses over s exponential, with mean e, then a new score would exceed s by t
    with probability ``(1 + t / (k e))^-k``, the uncertainty about their mean included: no promise of one in a million
    from k scores.

    Where scores truly lie close together (a lump, an end of their range) the slope of log p is limited to
    `STEEPEST` over the width of the middle half of the scores, by raising p-values, never by lowering them.

    A two-sided score, unusual when high or low, has the p-value ``min(p / (1 - a), q / a)``, q that of minus the score,
    a the share `SMALL`. Of the T tails each score's upper one comes first, then the lower one of each two-sided score.
    """

    scores: Tensor  # (T, m), the counted ones
    log_p: Tensor  # (T, m)
    start: Tensor  # (T, 1): s
    start_log_p: Tensor  # (T, 1)
    scale: Tensor  # (T, 1): e
    count: Tensor  # (T, 1): k
    two_sided: Tensor  # (T - K,): which scores have a lower tail
    other: Tensor  # (K,): the row of each score's lower tail, or of its upper one
    share: Tensor  # (T, 1): the logarithm of each tail's share of false alarms

    @classmethod
    def fit(cls, scores: Tensor, two_sided: Sequence[bool], *, counted: bool = False) -> PValues:
        """From calibration ``scores`` ``(K, n)``; ``counted`` counts every one, and describes what is above all."""
        both = torch.tensor(two_sided, device="cpu")
        lower, rows = both.nonzero().flatten(), torch.arange(len(both), device="cpu")
        tails = [_tail(row, counted) for row in torch.cat([scores, -scores[lower]]).double()]
        # Beyond the last counted score, s, no table is read.
        tables = {name: pad_sequence([tail[name] for tail in tails], True, math.inf) for name in tails[0]}
        other = rows.index_copy(0, lower, len(both) + torch.arange(len(lower), device="cpu"))
        share = torch.full_like(tables["scale"], math.log(SMALL))
        share[: len(both), 0] = both.double() * math.log1p(-SMALL)
        return cls(**tables, two_sided=lower, other=other, share=share)

    def forward(self, scores: Tensor) -> Tensor:
        """Log p-values ``(K, B)`` of ``scores`` ``(K, B)``, at most 0."""
        scores = scores.double()
        tails = torch.cat([scores, -scores.index_select(0, self.two_sided)])
        upper = torch.searchsorted(self.scores, tails).clamp(max=self.scores.shape[1] - 1)
        lower = (upper - 1).clamp(min=0)
        low, high = self.scores.gather(1, lower), self.scores.gather(1, upper)
        between = ((tails - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        first = self.log_p.gather(1, lower)
        body = first + between * (self.log_p.gather(1, upper) - first)
        excess = ((tails - self.start) / self.scale).clamp(min=0)
        log_p = torch.where(tails > self.start, self.start_log_p - self.count * torch.log1p(excess / self.count), body)
        log_p = log_p - self.share
        return torch.minimum(log_p[: len(self.other)], log_p.index_select(0, self.other)).clamp(max=0.0)


def _tail(scores: Tensor, counted: bool) -> dict[str, Tensor]:
    """One row of each buffer of `PValues`, from calibration scores ``(n,)``."""
    ordered = torch.sort(scores).values
    n = len(ordered)
    # Where the middle half has no width, that of all scores is taken, or else any.
    steepest = STEEPEST / (float(ordered[3 * n // 4] - ordered[n // 4]) or float(ordered[-1] - ordered[0]) or 1.0)
    count = min(n - 1, max(2, min(_TAIL, n // 10)))
    excess = ordered[n - count :] - ordered[n - 1 - count]
    above = 0 if counted else count
    # Counts of scores at or above some knots: from all down to a fifth in equal steps, from there in equal ratios.
    fifth = max(n / 5, above + 1)
    steps = math.ceil(math.log(fifth / (above + 1)) / _STEP) + 1
    some = torch.cat(
        [
            torch.linspace(n, fifth, 1 + round(4 / _STEP), dtype=torch.float64, device="cpu"),
            torch.linspace(math.log(fifth), math.log(above + 1), steps, dtype=torch.float64, device="cpu").exp(),
        ]
    ).round()
    knots = ordered if counted else ordered[(n - some).long().unique()]
    # Of tied scores the first counts all the others.
    log_p = torch.log((n - torch.searchsorted(ordered, knots)).double() / (n + 1))
    # The lowest map above this one that falls nowhere faster. A long line rounds: never below for that.
    line = steepest * (knots - ordered[n // 2])
    log_p = torch.maximum(log_p, torch.cummax(log_p + line, 0).values - line)
    scale = torch.clamp(excess.mean() if count else ordered.new_zeros(()), min=1 / steepest)
    return {
        "scores": knots,
        "log_p": log_p,
        "start": ordered[n - 1 - above :][:1],
        "start_log_p": log_p[-1:],
        "scale": scale.reshape(1),
        "count": ordered.new_tensor([max(1, count)]),
    }


def weighted(log_p: Tensor, cap: float, weights: Sequence[float]) -> Tensor:
    """Each -log p, at most ``cap``, times its weight: ``(B, K)``."""
    return (-log_p).clamp(max=cap) * log_p.new_tensor(weights)
