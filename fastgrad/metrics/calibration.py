"""Calibration: whether probabilities equal the share of right answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastgrad import checks
from fastgrad.checks import Array


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
        """Expected calibration error: the gap between confidence and accuracy, weighted by counts."""
        filled = self.counts > 0
        gaps = np.abs(self.confidence - self.accuracy)[filled]
        return float((gaps * self.counts[filled]).sum() / self.counts.sum())

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest gap of a bin that holds a sample."""
        return float(np.nanmax(np.abs(self.confidence - self.accuracy)))


def _probabilities(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> tuple[Array, NDArray[np.int64]]:
    p = checks.to_array("probabilities", probabilities)
    y: NDArray[Any] = checks.to_array("labels", labels)
    if p.ndim != 2 or not len(p) or p.shape[1] < 2:
        raise ValueError(f"probabilities must have shape (B, N), B >= 1, N >= 2; it was {p.shape}")
    if y.shape != (len(p),):
        raise ValueError(f"labels must have shape ({len(p)},), one per row; it was {y.shape}")
    if p.min() < 0 or p.max() > 1 + 1e-6:
        raise ValueError(f"probabilities must lie in [0, 1]; they were in [{p.min():g}, {p.max():g}]")
    indices = y.astype(np.int64)
    if (indices != y).any() or indices.min() < 0 or indices.max() >= p.shape[1]:
        raise ValueError(f"labels must be class indices 0 to {p.shape[1] - 1}; they were in [{y.min():g}, {y.max():g}]")
    return p, indices


def reliability(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor, *, bins: int = 15) -> Reliability:
    """Confidence and accuracy per bin of confidence.

    Args:
        probabilities: ``(B, N)`` in [0, 1]; rows of a softmax, or of an introspective network's sigmoids.
        labels: ``(B,)`` class indices.
        bins: number of bins of equal width; bins are open on the left, ``(a, b]``.

    Raises:
        ValueError: wrong shapes, values out of range, fewer than one bin.
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
    """Expected calibration error; arguments as for :func:`reliability`."""
    return reliability(probabilities, labels, bins=bins).ece


def mce(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor, *, bins: int = 15) -> float:
    """Maximum calibration error; arguments as for :func:`reliability`."""
    return reliability(probabilities, labels, bins=bins).mce


def brier(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Mean over samples of ``sum_j (p_j - [j = y])^2``, from 0 to 2 for rows that sum to 1 (Brier 1950).

    Arguments are as for :func:`reliability`.
    """
    p, y = _probabilities(probabilities, labels)
    true_p = p[np.arange(len(p)), y]
    # Leaving p_y out of the sum of squares keeps the digits of a nearly perfect forecast.
    others = p.copy()
    others[np.arange(len(p)), y] = 0
    return float(((1 - true_p) ** 2 + (others**2).sum(1)).mean())


def nll(probabilities: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Mean negative log-likelihood in nats of normalised rows; zeros count as the smallest normal float.

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
