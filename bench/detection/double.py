"""Two scores an input, one of errors and one of foreign inputs, judged together: DS-F1 and DS-AURC.

Li et al., "From Misclassifications to Outliers: Joint Reliability Assessment in Classification" (arXiv:2603.03903). An
input is accepted if both scores are at most their thresholds; it is a success if it is of a known class and classified
rightly. The definitions follow the evaluation code that the authors publish, except that thresholds are all values of
the scores, in place of grids, and that full coverage counts in the last bin, which their code leaves out.
Higher scores mean less reliable, as everywhere here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Shares of coverage over which the least risk is averaged, as the authors have it.
BINS = 100


def _accepted(
    error: ArrayLike, foreign: ArrayLike, right: ArrayLike, known: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], int]:
    """Return, for all pairs of thresholds, the accepted inputs, known ones and successes, and the known in all."""
    places = [np.unique(np.asarray(score, float), return_inverse=True)[1] for score in (error, foreign)]
    own = np.asarray(known, bool)
    good = own & np.asarray(right, bool)
    shape = tuple(int(place.max()) + 1 for place in places)
    found = []
    for weight in (np.ones(len(own)), own, good):
        counts = np.zeros(shape)
        np.add.at(counts, tuple(places), weight)
        found.append(counts.cumsum(0).cumsum(1))
    return found[0], found[1], found[2], int(own.sum())


def ds_f1(error: ArrayLike, foreign: ArrayLike, right: ArrayLike, known: ArrayLike) -> float:
    """Return the largest F1 of accepted successes over both thresholds.

    Precision is the share of successes among accepted inputs, recall the share of accepted successes among known ones.

    Args:
        error: Scores ``(n,)`` of how likely the answer is wrong.
        foreign: Scores ``(n,)`` of how unusual the input is.
        right: Whether each answer is right ``(n,)``; not read for foreign inputs.
        known: Whether each input is of a known class ``(n,)``.
    """
    accepted, _, good, total = _accepted(error, foreign, right, known)
    return float((2 * good / (accepted + total)).max())


def ds_aurc(error: ArrayLike, foreign: ArrayLike, right: ArrayLike, known: ArrayLike) -> float:
    """Return the area under the least risk by coverage of known inputs, over both thresholds; arguments as `ds_f1`.

    Risk is the share of accepted inputs that are no success, coverage the share of known inputs that are accepted. In
    each of 100 bins of coverage the least risk counts; an empty bin has that of the next one, and 1 if there is none.
    """
    accepted, own, good, total = _accepted(error, foreign, right, known)
    some = accepted > 0
    coverage, risk = own[some] / total, 1 - good[some] / accepted[some]
    least = np.full(BINS, np.inf)
    # Full coverage lies at the end of the last bin, and belongs to it.
    np.minimum.at(least, np.minimum((coverage * BINS).astype(int), BINS - 1), risk)
    after = 1.0
    for place in reversed(range(BINS)):
        least[place] = after = least[place] if np.isfinite(least[place]) else after
    return float(np.trapezoid(least, dx=1 / BINS))
