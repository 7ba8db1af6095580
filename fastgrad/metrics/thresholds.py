"""Thresholds of a score: from costs, with a guarantee, or at a share of what is to be found.

The guarantees are exact binomial bounds (Clopper and Pearson, "The use of confidence or fiducial limits illustrated in
the case of the binomial", 1934). They hold for new inputs that could have been drawn along with the calibration inputs,
in any order. They say nothing about inputs of another kind, and nothing if anything was fitted on these inputs.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastgrad import checks
from fastgrad.checks import Array
from fastgrad.metrics.risk_coverage import RiskCoverage, curve_of


def threshold_for(
    risk: ArrayLike | Tensor, errors: ArrayLike | Tensor, *, cost_of_error: float, cost_of_review: float
) -> float:
    """Return the risk threshold of least cost: samples above it are reviewed, the others answered.

    The mean cost of a sample is ``cost_of_error * risk * coverage + cost_of_review * (1 - coverage)``, minimised over
    the points of the risk-coverage curve. Give labelled samples on which nothing was fitted. Among equal costs, the
    highest coverage wins.

    Args:
        risk: ``(n,)``, from a `TwoStageModel`, or any score that is higher for less reliable samples; infinite values
            are always reviewed.
        errors: ``(n,)``, whether each prediction was wrong, or its loss, at least 0.
        cost_of_error: Cost of one wrong answer, or of a loss of 1, in any currency.
        cost_of_review: Cost of reviewing one sample, in the same currency; reviews are assumed to be right.

    Returns:
        One of the risks; minus infinity if reviewing every sample is cheapest.

    Raises:
        TypeError: A cost is not a number.
        ValueError: As for :func:`risk_coverage`, or a cost is not positive.
    """
    checks.lies_in("(0, inf)", cost_of_error=cost_of_error, cost_of_review=cost_of_review)
    curve = curve_of("risk", risk, errors)
    ends = _ends(curve)
    coverage = np.append(0.0, curve.coverage[ends])
    mean_error = np.append(0.0, curve.risk[ends])
    thresholds = np.append(-np.inf, curve.thresholds[ends])
    cost = cost_of_error * mean_error * coverage + cost_of_review * (1 - coverage)
    # Equal costs may differ by the rounding of sums of n terms.
    near = cost <= cost.min() + len(curve.risk) * np.finfo(np.float64).eps * max(
        cost_of_error * curve.risk.max(), cost_of_review
    )
    return float(thresholds[np.flatnonzero(near)[-1]])


def _ends(curve: RiskCoverage) -> NDArray[np.intp]:
    """Return the places where a threshold can be: the last sample of each tie, as tied samples pass together."""
    last = np.append(curve.thresholds[1:] != curve.thresholds[:-1], True)
    return np.flatnonzero(last & np.isfinite(curve.thresholds))


def certified_threshold(
    risk: ArrayLike | Tensor, errors: ArrayLike | Tensor, max_error: float = 0.02, confidence: float = 0.95
) -> float | None:
    """Return the largest risk that may be answered so that at most ``max_error`` of the answers are wrong.

    Inputs whose risk is at most the threshold are answered. In at least a share ``confidence`` of all calibration
    samples, the error rate of these answers on new inputs is at most ``max_error``.

    Candidate thresholds are tested from the lowest risk up, each by the exact binomial probability of as few errors at
    an error rate of ``max_error`` (Angelopoulos et al., "Learn then test", 2021). The tests have several starting
    points, which share ``1 - confidence``, and a passed test hands its share on to the next one (Wiens, "A fixed
    sequence Bonferroni procedure for testing multiple endpoints", 2003).

    The guarantee assumes that

    - new inputs come from the distribution of the calibration inputs. A new camera, season, class or attack breaks it;
      watch for these with `fastgrad.deploy.drift.DriftMonitor`, and calibrate again after an alarm.
    - calibration inputs are drawn independently: of a video, for example, one frame and not all.
    - nothing was fitted or chosen on them: not the network, the risk, or the best of several thresholds.
    - a higher risk never means fewer errors. Otherwise, the confidence is approximate.

    Args:
        risk: ``(n,)``, from a `TwoStageModel`, or any score that is higher for less reliable samples; infinite values
            are never answered.
        errors: ``(n,)``, whether each answer was wrong.
        max_error: Largest share of wrong answers among all answers, in (0, 1).
        confidence: In (0, 1).

    Returns:
        One of the risks. None if no threshold can be certified; a UserWarning then says why, and how many inputs might
        be enough.

    Raises:
        TypeError: ``max_error`` or ``confidence`` is not a number.
        ValueError: Shapes differ, an error is neither 0 nor 1, a risk is NaN or minus infinity, a number is out of
            range, or even without errors there are too few inputs: it takes ``log(1 - confidence) / log(1 -
            max_error)``, which is 149 for the default arguments.
    """
    checks.lies_in("(0, 1)", max_error=max_error, confidence=confidence)
    if not np.isin(checks.to_array("errors", errors), (0, 1)).all():
        raise ValueError("errors must be 0 (right) or 1 (wrong); there were others")
    curve = curve_of("risk", risk, errors)
    ends = _ends(curve)
    _require("risk", int(np.isfinite(curve.thresholds).sum()), "max_error", max_error, confidence)
    answered, wrong = ends + 1, np.rint(curve.risk[ends] * (ends + 1))
    passed = _last_passed(answered, wrong, max_error, confidence)
    if passed is not None:
        return float(curve.thresholds[ends[passed]])
    # Errors as frequent as here, in more inputs.
    times = (k for k in (2, 4, 8, 16) if _last_passed(k * answered, k * wrong, max_error, confidence) is not None)
    enough = next(times, None)
    outlook = "even 16 times as many would not do" if enough is None else f"{enough} times as many such inputs might do"
    warnings.warn(
        f"no threshold certifies max_error={max_error:g} with confidence={confidence:g} on {len(curve.risk)} inputs: "
        f"there are too many errors among those of low risk; {outlook}",
        stacklevel=2,
    )
    return None


def _last_passed(answered: NDArray[np.intp], wrong: Array, max_error: float, confidence: float) -> int | None:
    """Return the place of the last candidate that passes its test, or None.

    Candidate i answers ``answered[i]`` inputs, ``wrong[i]`` of them wrongly.
    """
    from scipy.stats import binom

    p_values = binom.cdf(wrong, answered, max_error)
    # Starting points from the fewest inputs that could pass to all, each about twice as many as the one before it:
    # on simulated risks, denser and sparser ones certified less.
    total, doubt = answered[-1], 1 - confidence
    starts = 1 + max(0, round(math.log2(total / _fewest(max_error, confidence))))
    first = min(total, _fewest(max_error, 1 - doubt / starts))
    places = np.searchsorted(answered, np.geomspace(first, total, starts).round())
    shares = np.bincount(places, minlength=len(answered)) * doubt / starts
    passed, level = None, 0.0
    for place, (share, p) in enumerate(zip(shares.tolist(), p_values.tolist(), strict=True)):
        level += share
        if p <= level * (1 + 1e-9):  # sums of shares are rounded
            passed = place
        else:
            level = 0.0
    return passed


def false_alarm_threshold(uncertainty: ArrayLike | Tensor, max_rate: float = 0.05, confidence: float = 0.95) -> float:
    """Return the lowest uncertainty that at most a share ``max_rate`` of new clean inputs exceeds.

    It does so for at least a share ``confidence`` of all calibration samples (a one-sided tolerance limit; Wilks,
    "Determination of sample sizes for setting tolerance limits", 1941), while `TwoStageModel.threshold` promises the
    rate on average over them. The assumptions are those of `certified_threshold`, but for the last one.

    Args:
        uncertainty: ``(n,)``, of clean inputs on which nothing was fitted; infinite where it could not be computed.
        max_rate: Largest share of false alarms, in (0, 1).
        confidence: In (0, 1).

    Returns:
        One of the uncertainties; inputs above it are flagged.

    Raises:
        TypeError: ``max_rate`` or ``confidence`` is not a number.
        ValueError: ``uncertainty`` is not a vector, holds NaN, or holds too few values: it takes
            ``log(1 - confidence) / log(1 - max_rate)``, which is 59 for the default arguments.
    """
    from scipy.stats import binom

    checks.lies_in("(0, 1)", max_rate=max_rate, confidence=confidence)
    scores = checks.vector("uncertainty", uncertainty, finite=False)
    if np.isnan(scores).any():
        raise ValueError("uncertainty must not hold NaN")
    _require("uncertainty", len(scores), "max_rate", max_rate, confidence)
    # The most alarms among n inputs that are improbable at a larger rate.
    alarms = int(np.flatnonzero(binom.cdf(np.arange(len(scores)), len(scores), max_rate) <= 1 - confidence)[-1])
    return float(np.sort(scores)[-alarms - 1])


def fpr_at_tpr(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor, tpr: float = 0.95) -> float:
    """Return the share of clean samples flagged at the largest threshold that flags ``tpr`` of the challenging ones.

    Args:
        clean: Scores of clean samples ``(n,)``.
        challenging: Scores of challenging samples ``(m,)``.
        tpr: Share of challenging samples that are flagged, in (0, 1].

    Raises:
        TypeError: ``tpr`` is not a number.
        ValueError: An argument is empty, not one-dimensional, not finite or out of range.
    """
    checks.lies_in("(0, 1]", tpr=tpr)
    first, second = checks.vector("clean", clean), checks.vector("challenging", challenging)
    # The k-th largest challenging score is the largest threshold that still flags k challenging samples.
    needed = max(1, math.ceil(tpr * len(second) - 1e-9))
    return float((first >= np.sort(second)[-needed]).mean())


def _fewest(share: float, confidence: float) -> int:
    """Return how few inputs without any error show, with this confidence, an error rate of at most ``share``."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-share) - 1e-9)


def _require(name: str, count: int, limit: str, share: float, confidence: float) -> None:
    """Raise ValueError if ``count`` inputs are too few for any promise."""
    if count < (least := _fewest(share, confidence)):
        possible = f", which could promise {limit}={1 - (1 - confidence) ** (1 / count):.2g} at best" if count else ""
        raise ValueError(
            f"{name} must hold at least {least} values that are finite, to promise {limit}={share:g} with "
            f"confidence={confidence:g}; there were {count}{possible}"
        )
