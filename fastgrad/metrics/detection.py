"""Detection: does a score separate challenging samples, the positive class, from clean ones?"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fastgrad import checks


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
