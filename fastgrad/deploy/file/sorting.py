"""Sorting of short rows as a network of comparisons, which compiles to vector instructions.

PyTorch sorts on a CPU by comparing single numbers, some 30 ns an element; compiled code has nothing else to call. In a
sorting network which elements are compared does not depend on their values, so many rows go through it side by side
(Batcher, "Sorting networks and their applications", 1968; here in the bitonic form of Knuth, volume 3, 5.3.4, with the
second run of every merge reversed, so that all runs ascend).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Elements of a row beyond which a network's n log(n)^2 steps, and the code for them, no longer pay.
_LONGEST = 2048
#: Rows that one step reads: two levels of comparisons. With more, a compiler no longer keeps them in registers.
_WIDTH = 4
#: Numbers of the widest vector.
_LANES = 16


def sort(x: Tensor, dim: int = -1, descending: bool = False) -> Any:
    """A decomposition of ``aten::sort`` for rows of at most 2048 floating numbers of a size that is known.

    Returns:
        The values from a network and the places from PyTorch, which a compiler drops where nobody asks for them. A NaN
        makes all of its row NaN.
    """
    size = x.shape[dim] if x.dim() else 1
    usual = x.is_floating_point() and not descending and dim in (-1, x.dim() - 1)
    if not usual or not isinstance(size, int) or not 1 < size <= _LONGEST:
        return NotImplemented
    # Rows side by side: what is compared lies in the first dimension.
    rows = x.reshape(-1, size).T.contiguous()
    if missing := (1 << (size - 1).bit_length()) - size:
        rows = torch.cat([rows, x.new_full((1, 1), math.inf).expand(missing, rows.shape[1])])
    values = _network(rows)[:size].T.reshape(x.shape)
    return values, torch.ops.aten.sort.stable(x, stable=True, dim=dim)[1]


def _network(x: Tensor) -> Tensor:
    """Each column of ``(n, R)`` in ascending order; n a power of two."""
    length, run = len(x), 2
    if length > _LANES**2:
        # Few rows, too, fill a vector: rows of every sixteenth element first, which then are the runs to be merged.
        run = length // _LANES
        strided = _network(x.reshape(run, -1)).view(run, _LANES, -1)
        x, run = strided.transpose(0, 1).reshape(x.shape), 2 * run
    while run <= length:
        # The levels of one merge, in as few steps as possible; what is left over comes first.
        levels, each = run.bit_length() - 1, _WIDTH.bit_length() - 1
        parts = 1 << (levels % each or each)
        x = _merge(x, run, parts, first=True)
        part = run // parts
        while part > 1:
            x = _merge(x, part, _WIDTH, first=False)
            part //= _WIDTH
        run *= 2
    return x


def _merge(x: Tensor, run: int, parts: int, *, first: bool) -> Tensor:
    """The first levels of merging each run, which is taken in equal parts.

    They are compared at a distance of half their number, a quarter and so on. At first a run consists of two that
    ascend, of which the second is read backwards.
    """
    pieces = list(x.reshape(len(x) // run, parts, run // parts, x.shape[1]).unbind(1))
    if first:
        half = parts // 2
        pieces = pieces[:half] + [piece.flip(1) for piece in reversed(pieces[half:])]
    distance = parts // 2
    while distance:
        for i in range(parts):
            if not i & distance:
                low, high = pieces[i], pieces[i + distance]
                pieces[i], pieces[i + distance] = torch.minimum(low, high), torch.maximum(low, high)
        distance //= 2
    return torch.stack(pieces, 1).reshape(x.shape)


#: For `torch.export.ExportedProgram.run_decompositions`.
TABLE: dict[Any, Callable[..., Any]] = {torch.ops.aten.sort.default: sort}
