"""Conformal p-values: what a score means, measured on clean data that took no part in fitting it.

Of n calibration scores and a new clean one, all exchangeable, the new one lies above the k-th highest with
probability ``k / (n + 1)``, whatever the score (Vovk, Gammerman and Shafer, "Algorithmic learning in a random
world", 2005). So that is the p-value of the k-th highest score: a share a of clean samples has p-values below a, on
average over calibration sets, exactly where a is a multiple of ``1 / (n + 1)`` and by interpolation between them. The
share itself scatters around a as a Beta distribution does. All p-values are kept as logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.scores.fitted import Fitted

#: Largest fall of log p over the width of the middle half of the calibration scores. Beyond 5 %, a normal
#: distribution falls by 2.8 to 4.5 (at one in a thousand) over that width, an exponential one by 1.1 everywhere.
STEEPEST = 8.0
#: Fall of log p from one score at which it is counted to the next, or of p in units of a fifth: the same at a fifth.
_STEP = 0.25
#: The highest scores, so many or a tenth if that is fewer, are described by their mean instead of counted.
_TAIL = 10


def _spread(ordered: Tensor) -> float:
    """Width of the middle half of sorted scores; of all of them, or one, where that is nothing."""
    n = len(ordered)
    middle = float(ordered[(3 * n) // 4] - ordered[n // 4]) if n > 1 else 0.0
    return middle or float(ordered[-1] - ordered[0]) or 1.0


class UpperTail(Fitted):
    """Natural logarithm of the p-value of a score, large scores being unusual.

    In the body p is counted at scores that are a few ranks apart and the logarithm interpolated between them, so
    that it is strictly monotone and two scores that happen to lie close together make no cliff, where the
    rounding of the network's float32 arithmetic would show in the p-value.

    Beyond the k-th highest score s, or beyond the highest where all are counted, the counts are too small to tell
    extreme values apart. Were the excesses over s exponential, with mean e, then a new score would exceed s by t with
    probability ``(1 + t / (k e))^-k``, the uncertainty about their mean included: strictly monotone, and no promise of
    one in a million from k scores.

    Where scores truly lie close together (a lump, an end of their range) the slope of log p is limited to
    `STEEPEST`, by raising p-values, never by lowering them.

    Buffers: ``scores`` and ``log_p``, the counted ones; ``start``, ``start_log_p``, ``scale``: s, its log p and e.
    Option ``count``: k.
    """

    scores: Tensor
    log_p: Tensor
    start: Tensor
    start_log_p: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, scores: Tensor, *, counted: bool = False) -> UpperTail:
        """From calibration ``scores`` ``(n,)``; ``counted`` counts up to the highest, and describes what is beyond."""
        ordered = torch.sort(scores.double()).values
        n = len(ordered)
        steepest = STEEPEST / _spread(ordered)
        count = min(n - 1, max(2, min(_TAIL, n // 10)))
        excess = ordered[n - count :] - ordered[n - 1 - count]
        above = 0 if counted else count
        # Counts of scores at or above a knot: from all down to a fifth in equal steps, from there in equal ratios.
        fifth = max(n / 5, above + 1)
        steps = math.ceil(math.log(fifth / (above + 1)) / _STEP) + 1
        counts = torch.cat(
            [
                torch.linspace(n, fifth, 1 + round(4 / _STEP), dtype=torch.float64),
                torch.linspace(math.log(fifth), math.log(above + 1), steps, dtype=torch.float64).exp(),
            ]
        ).round()
        knots = ordered[(n - counts).long().unique()]
        # Of tied scores the first counts all the others.
        log_p = torch.log((n - torch.searchsorted(ordered, knots)).double() / (n + 1))
        # The lowest map above this one that falls nowhere faster. A long line rounds: never below for that.
        line = steepest * (knots - ordered[n // 2])
        log_p = torch.maximum(log_p, torch.cummax(log_p + line, 0).values - line)
        scale = torch.clamp(excess.mean() if count else ordered.new_zeros(()), min=1 / steepest)
        return cls(
            scores=knots,
            log_p=log_p,
            start=ordered[n - 1 - above],
            start_log_p=log_p[-1],
            scale=scale,
            count=max(1, count),
        )

    def forward(self, scores: Tensor) -> Tensor:
        """Log p-values ``(B,)`` of ``scores`` ``(B,)``."""
        return upper_tails([self], scores.unsqueeze(0)).squeeze(0)


def upper_tails(tails: Sequence[UpperTail], scores: Tensor) -> Tensor:
    """Log p-values ``(K, B)`` of ``scores`` ``(K, B)``, each row by its own tail, in as many operations as for one."""

    def each(name: str) -> Tensor:
        # Compilers refuse to stack scalars.
        return torch.cat([getattr(tail, name).expand(1) for tail in tails]).unsqueeze(1)

    def table(name: str) -> Tensor:
        # Beyond the last counted score, `start`, no table is read.
        columns = [getattr(tail, name) for tail in tails]
        longest = max(len(column) for column in columns)

        def padded(column: Tensor) -> Tensor:
            missing = longest - len(column)
            return F.pad(column, (0, missing), value=math.inf) if missing else column

        return torch.stack([padded(column) for column in columns])

    scores = scores.double().contiguous()
    knots, log_p = table("scores"), table("log_p")
    upper = torch.searchsorted(knots, scores).clamp(max=knots.shape[1] - 1)
    lower = (upper - 1).clamp(min=0)
    low, high = knots.gather(1, lower), knots.gather(1, upper)
    share = ((scores - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    first = log_p.gather(1, lower)
    body = first + share * (log_p.gather(1, upper) - first)
    count = scores.new_tensor([tail.options["count"] for tail in tails]).unsqueeze(1)
    start = each("start")
    excess = ((scores - start) / each("scale")).clamp(min=0)
    return torch.where(scores > start, each("start_log_p") - count * torch.log1p(excess / count), body)


class OneSided(Fitted):
    """Log p-value of a score that is suspicious when high."""

    upper: UpperTail

    @classmethod
    def fit(cls, scores: Tensor, *, counted: bool = False) -> OneSided:
        """From calibration ``scores`` ``(n,)``, as `UpperTail.fit`."""
        return cls(upper=UpperTail.fit(scores, counted=counted))

    def forward(self, scores: Tensor) -> Tensor:
        """Log p-values ``(B,)``."""
        return p_value_map([self], scores.unsqueeze(0)).squeeze(0)


class TwoSided(Fitted):
    """Log of the typicality 2 min(p, 1 - p): too good to be true is as suspicious as too bad.

    An attack that overshoots makes a network more certain than any clean image does; one-sided, confidence
    and energy call it safe.
    """

    upper: UpperTail
    lower: UpperTail

    @classmethod
    def fit(cls, scores: Tensor) -> TwoSided:
        """From calibration ``scores`` ``(n,)``."""
        return cls(upper=UpperTail.fit(scores), lower=UpperTail.fit(-scores))

    def forward(self, scores: Tensor) -> Tensor:
        """Log typicalities ``(B,)``, at most 0."""
        return p_value_map([self], scores.unsqueeze(0)).squeeze(0)


def p_value_map(each: Sequence[OneSided | TwoSided], scores: Tensor) -> Tensor:
    """What each of K maps says of its row of ``scores`` ``(K, B)``: log p-values ``(K, B)``."""
    two = [k for k, meaning in enumerate(each) if isinstance(meaning, TwoSided)]
    tails = [meaning.upper for meaning in each]
    if not two:
        return upper_tails(tails, scores)
    chosen = torch.tensor(two, device=scores.device)
    lower = [meaning.lower for meaning in each if isinstance(meaning, TwoSided)]
    found = upper_tails([*tails, *lower], torch.cat([scores, -scores.index_select(0, chosen)]))
    smaller = torch.minimum(found.index_select(0, chosen), found[len(each) :])
    typical = (smaller + math.log(2.0)).clamp(max=0.0)
    places = [len(each) + two.index(k) if k in two else k for k in range(len(each))]
    order = torch.tensor(places, device=scores.device)
    return torch.cat([found[: len(each)], typical]).index_select(0, order)


def weighted(log_p: Tensor, cap: float, weights: Sequence[float]) -> Tensor:
    """Each -log p, at most ``cap``, times its weight: ``(B, K)``."""
    return (-log_p).clamp(max=cap) * log_p.new_tensor(weights)
