"""What is gained by answering only where risk or uncertainty is low: errors, coverage and the best threshold.

The risk-coverage curve shows the mean error of the answers against the share of samples that are answered, the
least uncertain first (Geifman and El-Yaniv, "Selective classification for deep neural networks", 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fastgrad import checks
from fastgrad.checks import Array


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve of n samples.

    Samples of equal uncertainty are answered together or not at all; between, the curve shows the mean over all
    orders in which they could come.

    Attributes:
        coverage: ``(n,)``, from 1/n to 1.
        risk: ``(n,)``, mean error of the share ``coverage`` of least uncertainty.
        best: ``(n,)``, the same for an order by the errors themselves, which no uncertainty can beat.
        thresholds: ``(n,)``, highest uncertainty in that share.
    """

    coverage: Array
    risk: Array
    best: Array
    thresholds: Array

    @property
    def aurc(self) -> float:
        """Area under the curve: the mean of ``risk``.

        Ding, Liu, Xiong and Shi, "Revisiting the evaluation of uncertainty estimation and its application to
        explore model complexity-uncertainty trade-off", 2020.
        """
        return float(self.risk.mean())

    @property
    def e_aurc(self) -> float:
        """Excess over the best possible area: 0 for a perfect order, however often the network is wrong.

        Geifman, Uziel and El-Yaniv, "Bias-reduced uncertainty estimation for deep neural classifiers", 2019.
        """
        return float((self.risk - self.best).mean())


def _curve(name: str, uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> RiskCoverage:
    """The curve of an uncertainty that errors call ``name``; what is infinite comes last."""
    losses = checks.to_array("errors", errors)
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"errors must be a non-empty vector; its shape was {losses.shape}")
    if losses.min() < 0:
        raise ValueError(f"errors must be at least 0; the smallest was {losses.min():g}")
    scores = checks.to_array(name, uncertainty, finite=False)
    if scores.shape != losses.shape:
        raise ValueError(f"{name} must have shape {losses.shape}, one score per error; it was {scores.shape}")
    if not (scores > -np.inf).all():
        raise ValueError(f"{name} must not hold NaN or minus infinity")
    values, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    # Each sample of a tie carries the mean error of all of them.
    means = np.bincount(group, losses) / sizes
    counts = np.arange(1, len(losses) + 1)
    return RiskCoverage(
        coverage=counts / len(losses),
        risk=np.repeat(means, sizes).cumsum() / counts,
        best=np.sort(losses).cumsum() / counts,
        thresholds=np.repeat(values, sizes),
    )


def risk_coverage(uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> RiskCoverage:
    """The risk-coverage curve.

    Args:
        uncertainty: ``(n,)``, higher is less reliable; infinite where it could not be computed.
        errors: ``(n,)``, whether each prediction was wrong, or its loss, at least 0.

    Raises:
        ValueError: Shapes differ, nothing is given, a loss is negative or not finite, or an uncertainty is NaN
            or minus infinity.
    """
    return _curve("uncertainty", uncertainty, errors)


def aurc(uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> float:
    """Area under the risk-coverage curve, lower is better; arguments as for :func:`risk_coverage`."""
    return risk_coverage(uncertainty, errors).aurc


def e_aurc(uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> float:
    """Excess area under the risk-coverage curve; arguments as for :func:`risk_coverage`."""
    return risk_coverage(uncertainty, errors).e_aurc


def threshold_for(
    risk: ArrayLike | Tensor, errors: ArrayLike | Tensor, *, cost_of_error: float, cost_of_review: float
) -> float:
    """Return the risk threshold of least cost: samples above it are reviewed, the others answered.

    The mean cost of a sample is ``cost_of_error * risk * coverage + cost_of_review * (1 - coverage)``, minimised over
    the points of the risk-coverage curve of labelled samples that nothing was fitted on. Of equal costs the highest
    coverage wins.

    Args:
        risk: ``(n,)``, of a `TwoStageModel`, or any score of which a higher one is less reliable; infinite ones are
            reviewed in any case.
        errors: ``(n,)``, whether each prediction was wrong, or its loss, at least 0.
        cost_of_error: Of one wrong answer, or of a loss of 1, in any currency.
        cost_of_review: Of one sample that is looked at, in the same currency; its review is taken to be right.

    Returns:
        One of the risks; minus infinity where a review is always cheaper.

    Raises:
        TypeError: A cost is no number.
        ValueError: As for :func:`risk_coverage`, or a cost is not positive.
    """
    for name, cost in (("cost_of_error", cost_of_error), ("cost_of_review", cost_of_review)):
        checks.is_number(**{name: cost})
        if not 0 < cost < math.inf:
            raise ValueError(f"{name} must be positive and finite; it was {cost!r}")
    curve = _curve("risk", risk, errors)
    # The last sample of each tie: a threshold lets all of them pass.
    ends = np.append(curve.thresholds[1:] != curve.thresholds[:-1], True) & np.isfinite(curve.thresholds)
    coverage = np.append(0.0, curve.coverage[ends])
    mean_error = np.append(0.0, curve.risk[ends])
    thresholds = np.append(-np.inf, curve.thresholds[ends])
    cost = cost_of_error * mean_error * coverage + cost_of_review * (1 - coverage)
    # Equal costs differ by rounding of sums of n terms.
    near = cost <= cost.min() + len(curve.risk) * np.finfo(np.float64).eps * max(
        cost_of_error * curve.risk.max(), cost_of_review
    )
    return float(thresholds[np.flatnonzero(near)[-1]])
