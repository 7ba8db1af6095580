"""How well scores distinguish challenging samples, the positive class, from clean ones; higher means less reliable."""

from __future__ import annotations

import math

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
    """Area under the ROC curve: chance that a challenging sample scores above a clean one, ties count half.

    Args:
        clean: scores of clean samples ``(n,)``.
        challenging: scores of challenging samples ``(m,)``.

    Raises:
        ValueError: an empty, not one-dimensional or not finite argument.
    """
    from sklearn.metrics import roc_auc_score

    scores, labels = _two_samples(clean, challenging)
    return float(roc_auc_score(labels, scores))


def aupr(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor) -> float:
    """Average precision, the area under the precision-recall curve, challenging as the positive class.

    Arguments are as for :func:`auroc`.
    """
    from sklearn.metrics import average_precision_score

    scores, labels = _two_samples(clean, challenging)
    return float(average_precision_score(labels, scores))


def fpr_at_tpr(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor, tpr: float = 0.95) -> float:
    """Share of clean samples flagged at the largest threshold that flags ``tpr`` of the challenging.

    Arguments are as for :func:`auroc`; ``tpr`` is a number in (0, 1], else TypeError or ValueError.
    """
    checks.is_number(tpr=tpr)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1]; it was {tpr}")
    scores, labels = _two_samples(clean, challenging)
    # The k-th largest challenging score is the largest threshold that still flags k of them.
    positive = np.sort(scores[labels == 1])[::-1]
    needed = max(1, math.ceil(tpr * len(positive) - 1e-9))
    return float((scores[labels == 0] >= positive[needed - 1]).mean())


def detection_accuracy(clean: ArrayLike | Tensor, challenging: ArrayLike | Tensor) -> float:
    """Largest ``(TPR + TNR) / 2`` over all thresholds: accuracy when both classes are equally likely.

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
