"""Metrics on arrays or tensors; scikit-learn is imported where it is used.

Scores follow the estimators of this package: higher means less reliable. *Detection*: does a score separate challenging
samples, the positive class, from clean ones? *Calibration*: does a probability equal the share of right answers?
*Selective prediction*: what is gained by answering only where the uncertainty is low? The risk-coverage curve plots the
mean error of the answers over the share of samples that are answered, starting with the least uncertain (Geifman and
El-Yaniv, "Selective classification for deep neural networks", 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastgrad import checks
from fastgrad.checks import Array


def _two_samples(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor) -> tuple[Array, NDArray[np.int64]]:
    first, second = checks.to_array("clean", clean), checks.to_array("challenging", challenging)
    for name, array in (("clean", first), ("challenging", second)):
        if array.ndim != 1 or not len(array):
            raise ValueError(f"{name} must be a non-empty vector of scores; its shape was {array.shape}")
    labels = np.concatenate([np.zeros(len(first), np.int64), np.ones(len(second), np.int64)])
    return np.concatenate([first, second]), labels


def auroc(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor) -> float:
    """Return the area under the ROC curve: the chance that a challenging sample scores above a clean one (ties: half).

    Args:
        clean: scores of clean samples ``(n,)``.
        challenging: scores of challenging samples ``(m,)``.

    Raises:
        ValueError: An argument is empty, not one-dimensional or not finite.
    """
    from sklearn.metrics import roc_auc_score

    scores, labels = _two_samples(clean, challenging)
    return float(roc_auc_score(labels, scores))


def aupr(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor) -> float:
    """Return the average precision, the area under the precision-recall curve; arguments as for :func:`auroc`."""
    from sklearn.metrics import average_precision_score

    scores, labels = _two_samples(clean, challenging)
    return float(average_precision_score(labels, scores))


def fpr_at_tpr(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor, tpr: float = 0.95) -> float:
    """Return the share of clean samples flagged at the largest threshold that flags ``tpr`` of the challenging ones.

    Arguments are as for :func:`auroc`; ``tpr`` is a number in (0, 1], else TypeError or ValueError.
    """
    checks.lies_in("(0, 1]", tpr=tpr)
    scores, labels = _two_samples(clean, challenging)
    # The k-th largest challenging score is the largest threshold that still flags k challenging samples.
    positive = np.sort(scores[labels == 1])[::-1]
    needed = max(1, math.ceil(tpr * len(positive) - 1e-9))
    return float((scores[labels == 0] >= positive[needed - 1]).mean())


def detection_accuracy(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor) -> float:
    """Return the largest ``(TPR + TNR) / 2`` over all thresholds: the accuracy if both classes are equally likely.

    Arguments are as for :func:`auroc`.
    """
    from sklearn.metrics import roc_curve

    scores, labels = _two_samples(clean, challenging)
    false_alarms, hits, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(((hits + 1 - false_alarms) / 2).max())


def detection_report(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor) -> dict[str, float]:
    """Return ``auroc``, ``aupr``, ``fpr95`` and ``accuracy``; arguments as for :func:`auroc`."""
    return {
        "auroc": auroc(clean, challenging),
        "aupr": aupr(clean, challenging),
        "fpr95": fpr_at_tpr(clean, challenging),
        "accuracy": detection_accuracy(clean, challenging),
    }


@dataclass(frozen=True)
class Reliability:
    """Bins of equal width over the confidence of the predicted class (Guo et al. 2017).

    Attributes:
        edges: ``(bins + 1,)`` bin edges from 0 to 1.
        counts: ``(bins,)`` samples per bin.
        confidence: ``(bins,)`` mean confidence; NaN in an empty bin.
        accuracy: ``(bins,)`` share of right predictions; NaN in an empty bin.
    """

    edges: Array
    counts: NDArray[np.int64]
    confidence: Array
    accuracy: Array

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean gap between confidence and accuracy, weighted by the bins' counts."""
        filled = self.counts > 0
        gaps = np.abs(self.confidence - self.accuracy)[filled]
        return float((gaps * self.counts[filled]).sum() / self.counts.sum())

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest gap among bins that are not empty."""
        return float(np.nanmax(np.abs(self.confidence - self.accuracy)))


def _probabilities(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> tuple[Array, NDArray[np.int64]]:
    p = checks.to_array("probabilities", probabilities)
    y: NDArray[Any] = checks.to_array("labels", labels)
    if p.ndim != 2 or not len(p) or p.shape[1] < 2:
        raise ValueError(f"probabilities must have shape (B, N), B >= 1, N >= 2; it was {p.shape}")
    checks.shape_is("labels", y, (len(p),), "one per row")
    if p.min() < 0 or p.max() > 1 + 1e-6:
        raise ValueError(f"probabilities must lie in [0, 1]; they were in [{p.min():g}, {p.max():g}]")
    indices = y.astype(np.int64)
    if (indices != y).any() or indices.min() < 0 or indices.max() >= p.shape[1]:
        raise ValueError(f"labels must be class indices 0 to {p.shape[1] - 1}; they were in [{y.min():g}, {y.max():g}]")
    return p, indices


def reliability(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor, *, bins: int = 15) -> Reliability:
    """Return confidence and accuracy per bin of confidence.

    Args:
        probabilities: ``(B, N)`` in [0, 1]; rows of a softmax, or of an introspective network's sigmoids.
        labels: ``(B,)`` class indices.
        bins: number of bins of equal width; bins are open on the left, ``(a, b]``.

    Raises:
        ValueError: Shapes are wrong, values are out of range, or there is less than one bin.
    """
    checks.at_least(1, bins=bins)
    p, y = _probabilities(probabilities, labels)
    confidence = np.minimum(p.max(1), 1)
    right = (p.argmax(1) == y).astype(np.float64)
    edges = np.arange(bins + 1) / bins
    which = np.maximum(np.searchsorted(edges, confidence) - 1, 0)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(which, confidence, bins) / counts
        mean_accuracy = np.bincount(which, right, bins) / counts
    return Reliability(edges, counts, mean_confidence, mean_accuracy)


def ece(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor, *, bins: int = 15) -> float:
    """Return the expected calibration error; arguments as for :func:`reliability`."""
    return reliability(probabilities, labels, bins=bins).ece


def mce(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor, *, bins: int = 15) -> float:
    """Return the maximum calibration error; arguments as for :func:`reliability`."""
    return reliability(probabilities, labels, bins=bins).mce


def brier(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Return the mean over samples of ``sum_j (p_j - [j = y])^2``, from 0 to 2 for rows that sum to 1 (Brier 1950).

    Arguments are as for :func:`reliability`.
    """
    p, y = _probabilities(probabilities, labels)
    # Expanded squares would cancel for a nearly perfect prediction.
    gaps = p.copy()
    gaps[np.arange(len(p)), y] -= 1
    return float((gaps**2).sum(1).mean())


def nll(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Return the mean negative log-likelihood of normalised rows, in nats; zeros count as the smallest normal float.

    Arguments are as for :func:`reliability`.
    """
    p, y = _probabilities(probabilities, labels)
    total = p.sum(1)
    share = np.divide(p[np.arange(len(p)), y], total, out=np.zeros(len(p)), where=total > 0)
    return float((0 - np.log(np.maximum(share, np.finfo(np.float64).tiny))).mean())


def calibration_report(
    probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor, *, bins: int = 15
) -> dict[str, float]:
    """Return ``accuracy``, ``ece``, ``mce``, ``brier`` and ``nll``; arguments as for :func:`reliability`."""
    p, y = _probabilities(probabilities, labels)
    curve = reliability(p, y, bins=bins)
    return {
        "accuracy": float((p.argmax(1) == y).mean()),
        "ece": curve.ece,
        "mce": curve.mce,
        "brier": brier(p, y),
        "nll": nll(p, y),
    }


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


def _curve(name: str, uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> RiskCoverage:
    """Return the curve of an uncertainty that error messages call ``name``; infinite values come last."""
    losses = checks.to_array("errors", errors)
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"errors must be a non-empty vector; its shape was {losses.shape}")
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
    return _curve("uncertainty", uncertainty, errors)


def aurc(uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> float:
    """Return the area under the risk-coverage curve; lower is better. Arguments are as for :func:`risk_coverage`."""
    return risk_coverage(uncertainty, errors).aurc


def e_aurc(uncertainty: ArrayLike | Tensor, errors: ArrayLike | Tensor) -> float:
    """Return the excess area under the risk-coverage curve; arguments as for :func:`risk_coverage`."""
    return risk_coverage(uncertainty, errors).e_aurc


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
    curve = _curve("risk", risk, errors)
    # Only the last sample of each tie is a candidate: a threshold lets all tied samples pass.
    ends = np.append(curve.thresholds[1:] != curve.thresholds[:-1], True) & np.isfinite(curve.thresholds)
    coverage = np.append(0.0, curve.coverage[ends])
    mean_error = np.append(0.0, curve.risk[ends])
    thresholds = np.append(-np.inf, curve.thresholds[ends])
    cost = cost_of_error * mean_error * coverage + cost_of_review * (1 - coverage)
    # Equal costs may differ by the rounding of sums of n terms.
    near = cost <= cost.min() + len(curve.risk) * np.finfo(np.float64).eps * max(
        cost_of_error * curve.risk.max(), cost_of_review
    )
    return float(thresholds[np.flatnonzero(near)[-1]])
