"""How a map changes from one position to its neighbours, and quantiles of that over positions.

Smooth regions, which every natural image has, show noise and compression in the low quantiles of local contrast;
edges show blur and overlays in the high ones (noise estimation as in Immerkaer, "Fast noise variance estimation",
1996).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgrad._torch import is_readable

#: Shares of positions that lie below the quantiles taken.
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Differences(NamedTuple):
    """What each inner position of a map differs by from its neighbours, ``(B, C, n, m)`` each.

    Attributes:
        centre: The position itself.
        vertical: Less the one below.
        horizontal: Less the one to the right.
        laplacian: Less all four around it, summed.
        diagonal: The vertical difference less that of the column to the right.
    """

    centre: Tensor
    vertical: Tensor
    horizontal: Tensor
    laplacian: Tensor
    diagonal: Tensor


def differences(x: Tensor, most: int) -> Differences:
    """Differences of ``x`` ``(B, C, H, W)``, H and W at least 3, on a regular grid of at most ``most`` positions."""
    step = 1
    while -(-(x.shape[2] - 2) // step) * -(-(x.shape[3] - 2) // step) > most:
        step += 1

    def shifted(down: int, right: int) -> Tensor:
        rows, columns = x.shape[2] - 2, x.shape[3] - 2
        # In one slice: an exported file copies what each of two would give.
        return x[:, :, 1 + down : 1 + down + rows : step, 1 + right : 1 + right + columns : step]

    centre, below, beside = shifted(0, 0), shifted(1, 0), shifted(0, 1)
    # Differences of neighbours, then their sums: exact zero where neighbours are equal.
    vertical, horizontal = centre - below, centre - beside
    laplacian = vertical + horizontal + (centre - shifted(-1, 0)) + (centre - shifted(0, -1))
    return Differences(centre, vertical, horizontal, laplacian, vertical - (beside - shifted(1, 1)))


def quantiles(values: Tensor) -> Tensor:
    """``(..., n)`` to ``(..., 7)``, interpolated as `torch.quantile` does, without its limit on size."""
    ordered = _sorted(values)
    places = [share * (values.shape[-1] - 1) for share in QUANTILES]
    lower = torch.tensor([int(place) for place in places], device=values.device)
    upper = torch.tensor([math.ceil(place) for place in places], device=values.device)
    weight = torch.tensor([place % 1 for place in places], dtype=values.dtype, device=values.device)
    low = ordered.index_select(-1, lower)
    return low + weight * (ordered.index_select(-1, upper) - low)


def _sorted(values: Tensor) -> Tensor:
    """Rows in ascending order, NaN last. On a CPU PyTorch takes twenty times as long for it as NumPy."""
    if is_readable(values) and values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return torch.sort(values, dim=-1).values
