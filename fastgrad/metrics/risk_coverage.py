"""Selective prediction: what is gained by answering only where the uncertainty is low?

The risk-coverage curve plots the mean error of the answers over the share of samples that are answered, starting with
the least uncertain (Geifman and El-Yaniv, "Selective classification for deep neural networks", 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fastgrad import checks
from fastgrad.checks import Array


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve of n samples.

    Samples of equal uncertainty are answered together or not at all. In between, the curve shows the mean over all
    orders of these samples.

    Attributes:
        coverage: ``(n,)``, from 1/n to 1.
        risk: ``(n,)``, mean error of the least uncertain samples, of which ``coverage`` is the share.
        best: ``(n,)``, the same if samples are sorted by their errors, which no uncertainty can beat.
        thresholds: ``(n,)``, highest uncertainty among these least uncertain samples.
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
        """Excess over the best possible area: 0 for a perfect ranking, however often the network is wrong.

        Geifman, Uziel and El-Yaniv, "Bias-reduced uncertainty estimation for deep neural classifiers", 2019.
        """
        return float((self.risk - self.best).mean())

    @property
    def augrc(self) -> float:
        """Area under the generalised curve, the share of all samples that are answered and wrong, over the coverage.

        Every error weighs the same wherever it is ranked, while `aurc` weighs those of the least uncertain samples
        most. For errors of 0 and 1 with mean r it is ``r (1 - r) (1 - AUROC) + r^2 / 2``.

        Traub et al., "Overcoming common flaws in the evaluation of selective classification systems", 2024.
        """
        wrong = self.risk * self.coverage
        # The trapezoidal rule, from no coverage on.
        return float(wrong.mean() - wrong[-1] / (2 * len(wrong)))


def curve_of(name: str, uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> RiskCoverage:
    """Return the curve of an uncertainty that error messages call ``name``; infinite values come last."""
    losses = checks.vector("errors", errors)
    if losses.min() < 0:
        raise ValueError(f"errors must be at least 0; the smallest was {losses.min():g}")
    scores = checks.to_array(name, uncertainty, finite=False)
    checks.shape_is(name, scores, losses.shape, "one score per error")
    if not (scores > -np.inf).all():
        raise ValueError(f"{name} must not hold NaN or minus infinity")
    values, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    # Each tied sample gets the mean error of all samples in its tie.
    means = np.bincount(group, losses) / sizes
    counts = np.arange(1, len(losses) + 1)
    return RiskCoverage(
        coverage=counts / len(losses),
        risk=np.repeat(means, sizes).cumsum() / counts,
        best=np.sort(losses).cumsum() / counts,
        thresholds=np.repeat(values, sizes),
    )


def risk_coverage(uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> RiskCoverage:
    """Return the risk-coverage curve.

    Args:
        uncertainty: ``(n,)``, higher is less reliable; infinite where it could not be computed.
        errors: ``(n,)``, whether each prediction was wrong, or its loss, at least 0.

    Raises:
        ValueError: Shapes differ, arrays are empty, a loss is negative or not finite, or an uncertainty is NaN or
            minus infinity.
    """
    return curve_of("uncertainty", uncertainty, errors)


def aurc(uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> float:
    """Return the area under the risk-coverage curve; lower is better. Arguments are as for :func:`risk_coverage`."""
    return risk_coverage(uncertainty, errors).aurc


def augrc(uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> float:
    """Return the area under the generalised risk-coverage curve; arguments as for :func:`risk_coverage`."""
    return risk_coverage(uncertainty, errors).augrc


def e_aurc(uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> float:
    """Return the excess area under the risk-coverage curve; arguments as for :func:`risk_coverage`."""
    return risk_coverage(uncertainty, errors).e_aurc
