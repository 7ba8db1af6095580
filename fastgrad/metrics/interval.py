"""A mean and its interval, from values of which some have one source."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: NDArray[np.float64], sources: NDArray[np.intp]) -> Interval:
        """Return those of ``values`` ``(n,)``; values of one source are not independent."""
        mean = values.mean()
        sums = np.bincount(np.unique(sources, return_inverse=True)[1], values - mean)
        return cls(float(mean), float(1.96 * np.sqrt(np.square(sums).sum()) / len(values)))
