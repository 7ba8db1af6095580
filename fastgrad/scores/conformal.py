"""Conformal p-values: what a score means, measured on clean data that took no part in fitting it.

If n calibration scores and a new clean score are exchangeable, the new one exceeds the k-th highest with probability
``k / (n + 1)``, or less if scores are equal, whatever the score (Vovk, Gammerman and Shafer, "Algorithmic learning in a
random world", 2005). This is the p-value of the k-th highest score. If every score is counted, at most a share a of
clean samples has p-values below a, on average over calibration sets, for every multiple a of ``1 / (n + 1)``. The share
is a unless scores lie close together; for other a it is interpolated. It has a Beta distribution over calibration sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgrad.scores.fitted import Fitted

#: Largest decrease of log p over the interquartile range of the calibration scores. Beyond 5 %, log p of a normal
#: distribution decreases by 2.8 to 4.5 (at one in a thousand) over that range, of an exponential by 1.1 everywhere.
STEEPEST = 8.0
#: Decrease of log p from one counted score to the next where p is below a fifth; above, decrease of p in fifths.
_STEP = 0.25
#: Number of the highest scores (or a tenth of all, if fewer) that are described by their mean instead of counted.
_TAIL = 10
#: Share of a two-sided score's false alarms that go to low values. Few inputs are unusually low, but those are far out.
#: AUROC on EfficientNet-Lite0, and of attacks without challenges: .5: .889, .920; .05: .893, .918; none: .890, .814.
SMALL = 0.05


class PValues(Fitted):
    """Natural logarithms of the p-values of K scores: high scores are unusual, and for two-sided ones low scores, too.

    In the body of the distribution, p is counted at every score, or at scores a few ranks apart, and log p is
    interpolated. So it is strictly monotone, without jumps between close scores that would show the network's rounding.

    Beyond s, the (k + 1)-th highest score, or the highest where all are counted, the counts are too small to tell
    extreme values apart. k is 10, or a tenth of the scores if that is fewer, but at least 2; e is the mean excess of
    the k highest over the next one. If excesses over s are exponential with mean e, a new score exceeds s by t with
    probability ``(1 + t / (k e))^-k``. This includes the uncertainty of e: k scores cannot promise one in a million.

    Where scores lie very close together (a cluster, an end of their range), the slope of log p is limited to
    `STEEPEST` over the interquartile range. This raises p-values and never lowers them.

    A two-sided score is unusual when high or low. Its p-value is ``min(p / (1 - a), q / a)``, where q is the p-value of
    the negated score and a the share `SMALL`. The T tails are the upper tails of all scores, then the lower tails of
    the two-sided ones.
    """

    scores: Tensor  # (T, m), the counted ones
    log_p: Tensor  # (T, m)
    start: Tensor  # (T, 1): s
    start_log_p: Tensor  # (T, 1)
    scale: Tensor  # (T, 1): e
    count: Tensor  # (T, 1): k
    two_sided: Tensor  # (T - K,): which scores have a lower tail
    other: Tensor  # (K,): the row of each score's lower tail, or of its upper tail if it has no lower one
    share: Tensor  # (T, 1): the logarithm of each tail's share of false alarms

    @classmethod
    def fit(cls, scores: Tensor, two_sided: Sequence[bool], *, counted: bool = False) -> PValues:
        """Fit on calibration ``scores`` ``(K, n)``; ``counted`` counts every one: the tail starts above the highest."""
        both = torch.tensor(two_sided, device="cpu")
        lower, rows = both.nonzero().flatten(), torch.arange(len(both), device="cpu")
        tails = [_tail(row, counted) for row in torch.cat([scores, -scores[lower]]).double()]
        # The padding is not read: beyond s, the last counted score, a formula takes over.
        tables = {name: pad_sequence([tail[name] for tail in tails], True, math.inf) for name in tails[0]}
        other = rows.index_copy(0, lower, len(both) + torch.arange(len(lower), device="cpu"))
        share = torch.full_like(tables["scale"], math.log(SMALL))
        share[: len(both), 0] = both.double() * math.log1p(-SMALL)
        return cls(**tables, two_sided=lower, other=other, share=share)

    def forward(self, scores: Tensor) -> Tensor:
        """Return the log p-values ``(K, B)`` of ``scores`` ``(K, B)``, at most 0."""
        scores = scores.double()
        # Where no score has a lower tail, some operations less, which count in the answer to a single input.
        lower_tails = len(self.two_sided) > 0
        tails = torch.cat([scores, -scores.index_select(0, self.two_sided)]) if lower_tails else scores
        upper = torch.searchsorted(self.scores, tails).clamp(max=self.scores.shape[1] - 1)
        lower = (upper - 1).clamp(min=0)
        low, high = self.scores.gather(1, lower), self.scores.gather(1, upper)
        between = ((tails - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        first = self.log_p.gather(1, lower)
        body = first + between * (self.log_p.gather(1, upper) - first)
        excess = ((tails - self.start) / self.scale).clamp(min=0)
        log_p = torch.where(tails > self.start, self.start_log_p - self.count * torch.log1p(excess / self.count), body)
        log_p = log_p - self.share
        if not lower_tails:
            return log_p.clamp(max=0.0)
        return torch.minimum(log_p[: len(self.other)], log_p.index_select(0, self.other)).clamp(max=0.0)


def _tail(scores: Tensor, counted: bool) -> dict[str, Tensor]:
    """Return one row of each buffer of `PValues`, from calibration scores ``(n,)``."""
    ordered = torch.sort(scores).values
    n = len(ordered)
    # If the interquartile range is 0, the whole range counts, or else 1.
    steepest = STEEPEST / (float(ordered[3 * n // 4] - ordered[n // 4]) or float(ordered[-1] - ordered[0]) or 1.0)
    count = min(n - 1, max(2, min(_TAIL, n // 10)))
    excess = ordered[n - count :] - ordered[n - 1 - count]
    above = 0 if counted else count
    # Numbers of scores at or above each knot: in equal steps from all down to a fifth, then in equal ratios.
    fifth = max(n / 5, above + 1)
    steps = math.ceil(math.log(fifth / (above + 1)) / _STEP) + 1
    some = torch.cat(
        [
            torch.linspace(n, fifth, 1 + round(4 / _STEP), dtype=torch.float64, device="cpu"),
            torch.linspace(math.log(fifth), math.log(above + 1), steps, dtype=torch.float64, device="cpu").exp(),
        ]
    ).round()
    knots = ordered if counted else ordered[(n - some).long().unique()]
    # The first of tied scores counts all of them.
    log_p = torch.log((n - torch.searchsorted(ordered, knots)).double() / (n + 1))
    # The lowest curve above log p that is nowhere steeper. The maximum undoes rounding, which is large for a long line.
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
    """Return each -log p, at most ``cap``, times its weight: ``(B, K)``."""
    return (-log_p).clamp(max=cap) * log_p.new_tensor(weights)
