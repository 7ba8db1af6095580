"""Arguments of metrics as arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]


def numbers(values: ArrayLike | Tensor) -> Array:
    """A float64 array; tensors come from any device."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
