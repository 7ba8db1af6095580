"""An error rate without labels: how many answers to a stream of inputs are wrong?

The risk is fitted on clean inputs and challenges of equal weight, so its mean over a stream is right if half of the
stream is unusual. On clean inputs it is too high by the *excess*, which they owe to the challenges; on challenges it is
too low by as much. With a share b of unusual inputs, the error rate is therefore

    mean of the risk + excess (2 b - 1).

Storey's estimate gives b (*A direct approach to false discovery rates*, 2002): the p-values of clean inputs are
uniform, so a share of 1 - `USUAL` of them have a p-value above `USUAL`, but few of the unusual ones.

No labels say how many answers to unusual inputs are wrong: nearly all of an attack's, few of a brighter image's. So the
upper end of the interval trusts the risk only of inputs that look usual. It takes the largest b that chance allows, in
the stream and in the clean inputs that p-values compare with. All answers to that share of the inputs, the most unusual
ones, count as wrong. At the lower end `LEAST` of what the risk says comes true, of every input.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fastgrad import checks

#: Fewer inputs allow no estimate.
FEWEST = 30
#: Inputs with a p-value above this look usual. Some attacks' are spread up to here; above, they are rare.
USUAL = 0.7
#: Share of the risk that comes true at the least: of a kind of generated challenges, by a risk that was fitted without
#: it. `bench.detection error-rate` measures the share of every kind.
LEAST = 0.4


class ErrorRate(NamedTuple):
    """An estimated share of wrong answers, and the bounds of its interval."""

    rate: float
    low: float
    high: float


def error_rate(
    risk: ArrayLike | Tensor, uncertainty: ArrayLike | Tensor, excess: float, clean: int, *, confidence: float = 0.95
) -> ErrorRate:
    """Estimate the share of wrong answers to inputs without labels.

    ``low`` holds if at least two fifths as many answers are wrong as the risk says. ``high`` holds if the uncertainty
    of unusual inputs shows that they are unusual: it counts all answers to these as wrong. The interval is wide where
    many are unusual.

    Some errors cannot be seen, because their inputs look usual and are answered with confidence: attacks after
    compression such as JPEG, and near sets, whose new classes resemble known ones. The true rate is then above the
    interval, and nothing in the stream shows it.

    Args:
        risk: ``(n,)``, of a stream of at least 30 inputs, in any order.
        uncertainty: ``(n,)``, of the same inputs; infinite where it could not be computed.
        excess: Mean of ``risk - (1 - probabilities.amax(1))`` over clean inputs, above 0, as an exported file holds it.
        clean: Number of clean inputs that the uncertainty was fitted on, such as ``len(two_stage.calibration_scores)``.
        confidence: Of the interval, in (0, 1).

    Raises:
        TypeError: ``excess`` or ``confidence`` is not a number, or ``clean`` not an integer.
        ValueError: Shapes differ, there are fewer than 30 inputs, a value is NaN, a risk is outside [0, 1], or a number
            is out of range. Without generated challenges, or without labels, the risk says nothing about unusual
            inputs, and the excess is 0.
    """
    checks.lies_in("(0, 1)", confidence=confidence)
    check_excess(excess)
    checks.at_least(1, clean=clean)
    p_wrong, unusual = checks.vector("risk", risk), checks.vector("uncertainty", uncertainty, finite=False)
    checks.shape_is("uncertainty", unusual, p_wrong.shape, "one per risk")
    if len(p_wrong) < FEWEST:
        raise ValueError(f"risk must hold at least {FEWEST} values for an error rate; it held {len(p_wrong)}")
    if np.isnan(unusual).any() or p_wrong.min() < 0 or p_wrong.max() > 1:
        raise ValueError("risk must lie in [0, 1] and uncertainty must not hold NaN")
    count, quantile = len(p_wrong), NormalDist().inv_cdf((1 + confidence) / 2)
    # Not clipped at 0: chance would then raise the estimate for clean streams.
    share = 1 - float((unusual < -math.log(USUAL)).mean()) / (1 - USUAL)
    rate = float(np.clip(p_wrong.mean() + excess * (2 * share - 1), 0, 1))
    # The standard deviation of the share of clean inputs that look usual, over 1 - USUAL: of the stream's, and of those
    # that set which p-value an input has.
    spread = math.sqrt(USUAL / (1 - USUAL) * (1 / count + 1 / clean))
    apart = math.ceil(count * min(max(share, 0.0) + quantile * spread, 1.0))
    # Equal uncertainties are ordered by the risk, so the order of the stream has no effect.
    usual = p_wrong[np.lexsort((p_wrong, -unusual))][apart:]
    chance = quantile * math.sqrt(float((p_wrong * (1 - p_wrong)).mean()) / count)
    low = LEAST * float(p_wrong.mean()) - chance
    high = (float(usual.sum()) + apart) / count + chance
    return ErrorRate(rate, max(min(low, rate), 0.0), min(max(high, rate), 1.0))


def check_excess(excess: float) -> None:
    """Raise TypeError or ValueError unless ``excess`` can be that of a risk fitted with challenges."""
    checks.is_number(excess=excess)
    if not 0 < excess < 1:
        raise ValueError(
            f"excess must lie in (0, 1); it was {excess!r}. It is 0 if the risk was fitted without generated challenges"
        )
