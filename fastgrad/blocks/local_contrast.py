"""How a map changes from one position to its neighbours, and how that is distributed over positions.

Smooth regions, which every natural image has, show noise and compression where local contrast is low; edges show blur
and overlays where it is high (noise estimation as in Immerkaer, "Fast noise variance estimation", 1996).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Values whose largest is taken, and so often again of those: of 4, 16 and 64.
_EACH, _TIMES = 4, 3


def differences(x: Tensor, most: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Inner positions of ``x`` ``(B, C, H, W)`` and what they differ by from their neighbours, ``(B, C, n, m)`` each.

    From the one below less the same of the next column, from the one below, and from the one to the right: exactly zero
    where neighbours are equal. H and W are at least 3, and n m at most ``most``, on a regular grid.
    """
    rows, columns = x.shape[2] - 2, x.shape[3] - 2
    step = 1
    while -(-rows // step) * -(-columns // step) > most:
        step += 1

    def shifted(down: int, right: int) -> Tensor:
        # In one slice: an exported file copies what each of two would give.
        return x[:, :, 1 + down : 1 + down + rows : step, 1 + right : 1 + right + columns : step]

    centre, below, beside = shifted(0, 0), shifted(1, 0), shifted(0, 1)
    vertical = centre - below
    return centre, (vertical - (beside - shifted(1, 1)), vertical, centre - beside)


def mean_extremes(values: Tensor) -> Tensor:
    """How the n values of each row are distributed, ``(B, K, n)`` to ``(B, 7 K)``.

    K columns each: their mean, and of 4, 16 and 64 of them the mean largest and minus the mean smallest; for quantiles,
    the sort would be half of the price of the default blocks. Values i, i + n // 4 and so on make one group, and groups
    likewise; those left over when all groups are full count in the mean alone.
    """
    groups = _grouped(values)
    both = torch.cat([groups.amax(-2), -groups.amin(-2)], 1)
    columns = [values.mean(-1), both.mean(-1)]
    for _ in range(_TIMES - 1):
        both = _grouped(both).amax(-2)
        columns.append(both.mean(-1))
    return torch.cat(columns, 1)


def _grouped(values: Tensor) -> Tensor:
    """``(B, K, n)`` as ``(B, K, 4, n // 4)``."""
    each = min(_EACH, values.shape[-1])
    groups = values.shape[-1] // each
    grouped: Tensor = values[..., : each * groups].unflatten(-1, (each, groups))
    return grouped
