"""Detection figures with bootstrap intervals over images: first as measured, then on resampled images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
RESAMPLES = 200


def _counts(rng: np.random.Generator, n: int) -> Scores:
    """Return how often each image counts, ``(1 + R, n)``; once each in the first row. All methods share resamples."""
    return np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)])


def auroc(clean: Scores, other: Scores) -> Scores:
    """Return the AUROC ``(1 + R,)`` of ``clean`` against ``other`` scores."""
    rng = np.random.default_rng(len(clean) + len(other))
    first, second = (_counts(rng, n) / n for n in (len(clean), len(other)))
    above = (other[None] > clean[:, None]) + 0.5 * (other[None] == clean[:, None])
    return ((first @ above) * second).sum(1)  # type: ignore[no-any-return]


def grouped_auroc(scores: Scores, wrong: Scores, source: NDArray[np.int64]) -> Scores:
    """Return the AUROC ``(1 + R,)`` of wrong against right answers; copies of one image are drawn together."""
    ids, places = np.unique(source, return_inverse=True)
    weights = _counts(np.random.default_rng(len(ids)), len(ids))[:, places]
    bad = wrong > 0
    above = (scores[bad][:, None] > scores[~bad]) + 0.5 * (scores[bad][:, None] == scores[~bad])
    of_bad, of_good = weights[:, bad], weights[:, ~bad]
    return ((of_bad @ above) * of_good).sum(1) / (of_bad.sum(1) * of_good.sum(1))  # type: ignore[no-any-return]


def mean(values: Scores) -> Scores:
    """Return the mean ``(1 + R,)`` of one value per image."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return np.concatenate([[values.mean()], values[drawn].mean(1)])


def columns(name: str, values: Scores) -> dict[str, Any]:
    """Return the columns of a row: the measured value, and the interval that holds 95 % of the resampled ones."""
    bounds = np.nanquantile(values[1:], [0.025, 0.975])
    return {name: round(float(values[0]), 4), "interval": [round(float(bound), 4) for bound in bounds]}
