"""Calibration: does a probability equal the share of right answers?"""

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
