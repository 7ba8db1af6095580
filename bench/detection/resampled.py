"""Detection figures with bootstrap intervals over images: as found first, then on resampled images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
RESAMPLES = 200


def _weights(clean: int, other: int) -> tuple[Scores, Scores]:
    """How much each image counts, ``(1 + R, n)`` each; once each to begin with. All methods share the resamples."""
    rng = np.random.default_rng(clean + other)
    first, second = (
        np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)]) / n for n in (clean, other)
    )
    return first, second


def auroc(clean: Scores, other: Scores) -> Scores:
    """AUROC ``(1 + R,)``."""
    first, second = _weights(len(clean), len(other))
    above = (other[None] > clean[:, None]) + 0.5 * (other[None] == clean[:, None])
    return ((first @ above) * second).sum(1)  # type: ignore[no-any-return]


def grouped_auroc(scores: Scores, wrong: Scores, source: NDArray[np.int64]) -> Scores:
    """AUROC ``(1 + R,)`` of wrong against right answers; copies of one image are drawn together."""
    ids, places = np.unique(source, return_inverse=True)
    rng = np.random.default_rng(len(ids))
    drawn = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), RESAMPLES)
    weights = np.concatenate([np.ones((1, len(ids))), drawn])[:, places]
    bad = wrong > 0
    above = (scores[bad][:, None] > scores[~bad]) + 0.5 * (scores[bad][:, None] == scores[~bad])
    of_bad, of_good = weights[:, bad], weights[:, ~bad]
    return ((of_bad @ above) * of_good).sum(1) / (of_bad.sum(1) * of_good.sum(1))  # type: ignore[no-any-return]


def mean(values: Scores) -> Scores:
    """The mean ``(1 + R,)`` of one value an image."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return np.concatenate([[values.mean()], values[drawn].mean(1)])


def bounds(resamples: Scores) -> list[float]:
    """95 % of the values lie between these two."""
    low, high = np.nanquantile(resamples, [0.025, 0.975])
    return [float(low), float(high)]


def interval(values: Scores) -> list[float]:
    """`bounds` of the resampled values ``(1 + R,)``, as a file of results keeps them."""
    return [round(value, 4) for value in bounds(values[1:])]
