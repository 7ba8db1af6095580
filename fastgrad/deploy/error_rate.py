"""An error rate without labels: how many answers to a stream of inputs are wrong?

The estimate is the share of answers whose risk is above a limit, the one above which as many answers to clean inputs
are as were wrong. That is ATC (Garg et al., *Leveraging unlabeled data to predict out-of-distribution performance*,
ICLR 2022) with the risk in place of the confidence, which attacks and foreign inputs leave high.

No labels say how many answers to unusual inputs are wrong: nearly all of an attack's, few of a brighter image's. So the
upper end of the interval trusts the risk only of inputs that look usual. Storey's estimate gives the share b of unusual
inputs (*A direct approach to false discovery rates*, 2002): the p-values of clean inputs are uniform, so a share of
1 - `USUAL` of them have a p-value above `USUAL`, but few of the unusual ones. The upper end takes the largest b that
chance allows, in the stream and in the clean inputs that p-values compare with. All answers to that share of the
inputs, the most unusual ones, count as wrong. At the lower end `LEAST` of what the risk says comes true.
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
    risk: ArrayLike | Tensor, uncertainty: ArrayLike | Tensor, wrong_above: float, clean: int, *,
    confidence: float = 0.95,
) -> ErrorRate:  # fmt: skip
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
        wrong_above: The risk above which as many answers to clean inputs are as were wrong:
            ``two_stage.wrong_above``, which an exported file holds as well.
        clean: Number of clean inputs that the uncertainty was fitted on, such as ``len(two_stage.calibration_scores)``.
        confidence: Of the interval, in (0, 1).

    Raises:
        TypeError: ``wrong_above`` or ``confidence`` is not a number, or ``clean`` not an integer.
        ValueError: Shapes differ, there are fewer than 30 inputs, a value is NaN, a risk is outside [0, 1], or a number
            is out of range. Without generated challenges, or without labels, the risk says nothing about unusual
            inputs, and there is no limit.
    """
    checks.lies_in("(0, 1)", confidence=confidence)
    check_limit(wrong_above)
    checks.at_least(1, clean=clean)
    p_wrong, unusual = checks.vector("risk", risk), checks.vector("uncertainty", uncertainty, finite=False)
    checks.shape_is("uncertainty", unusual, p_wrong.shape, "one per risk")
    if len(p_wrong) < FEWEST:
        raise ValueError(f"risk must hold at least {FEWEST} values for an error rate; it held {len(p_wrong)}")
    if np.isnan(unusual).any() or p_wrong.min() < 0 or p_wrong.max() > 1:
        raise ValueError("risk must lie in [0, 1] and uncertainty must not hold NaN")
    count, quantile = len(p_wrong), NormalDist().inv_cdf((1 + confidence) / 2)
    share = 1 - float((unusual < -math.log(USUAL)).mean()) / (1 - USUAL)
    rate = float((p_wrong > wrong_above).mean())
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


def check_limit(wrong_above: float) -> None:
    """Raise TypeError or ValueError unless ``wrong_above`` can be the risk above which answers count as wrong."""
    if wrong_above is None:
        raise ValueError("wrong_above must be a number from 0 to 1; it was None: there is none without challenges")
    checks.is_number(wrong_above=wrong_above)
    if not 0 <= wrong_above <= 1:
        raise ValueError(f"wrong_above must be a number from 0 to 1; it was {wrong_above!r}")
