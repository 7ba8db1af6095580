"""Differences of a map between neighbouring positions, and their distribution over positions.

Every natural image has smooth regions, whose low local contrast shows noise and compression. The high contrast at edges
shows blur and overlays (noise estimation as in Immerkaer, "Fast noise variance estimation", 1996).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Values of which the largest is taken, and how often this is done in turn: extremes of 4, 16 and 64 values.
_EACH, _TIMES = 4, 3


def differences(x: Tensor, most: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return inner positions of ``x`` ``(B, C, H, W)`` and their differences from neighbours, ``(B, C, n, m)`` each.

    The differences are the mixed one (vertical, then horizontal), the vertical and the horizontal one: exactly zero
    where neighbours are equal. H and W are at least 3, and n m at most ``most``, on a regular grid.
    """
    rows, columns = x.shape[2] - 2, x.shape[3] - 2
    step = 1
    while -(-rows // step) * -(-columns // step) > most:
        step += 1

    def shifted(down: int, right: int) -> Tensor:
        # One slice, because an exported file would copy the result of each of two.
        return x[:, :, 1 + down : 1 + down + rows : step, 1 + right : 1 + right + columns : step]

    centre, below, beside = shifted(0, 0), shifted(1, 0), shifted(0, 1)
    vertical = centre - below
    return centre, (vertical - (beside - shifted(1, 1)), vertical, centre - beside)


def mean_extremes(values: Tensor) -> Tensor:
    """Describe how the n values of each row are distributed, ``(B, K, n)`` to ``(B, 7 K)``.

    K columns each: the mean, and over groups of 4, 16 and 64 values the mean maximum and minus the mean minimum.
    Quantiles need a sort, which would be half of the price of the default blocks. Values i, i + n // 4 and so on form
    a group, and groups likewise; values left over when all groups are full count only in the mean.
    """
    groups = _grouped(values)
    both = torch.cat([groups.amax(-2), -groups.amin(-2)], 1)
    columns = [values.mean(-1), both.mean(-1)]
    for _ in range(_TIMES - 1):
        both = _grouped(both).amax(-2)
        columns.append(both.mean(-1))
    return torch.cat(columns, 1)


def _grouped(values: Tensor) -> Tensor:
    """Return ``(B, K, n)`` as ``(B, K, 4, n // 4)``."""
    each = min(_EACH, values.shape[-1])
    groups = values.shape[-1] // each
    grouped: Tensor = values[..., : each * groups].unflatten(-1, (each, groups))
    return grouped
