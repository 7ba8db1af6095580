"""Batched matrix products on a CPU, by whichever of the framework's two libraries is faster.

``torch.bmm`` calls MKL, which leaves the widest vector registers of an AMD EPYC unused; oneDNN takes 0.5 to 0.8 of its
time for the sizes that `suits` accepts. ``left[n] @ right[n]`` is a convolution with kernel 1 whose groups are samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: oneDNN works on blocks of so many channels; other numbers take a slow path.
BLOCK = 16
#: Elements of one matrix of weights below which the detour does not pay.
FEWEST = 8192


def suits(rows: int, inner: int) -> bool:
    """Whether the detour pays for ``(rows, inner) @ (inner, anything)``."""
    return rows % BLOCK == 0 and inner % BLOCK == 0 and rows * inner >= FEWEST


def product(left: Tensor, right: Tensor, *, concrete: bool) -> Tensor:
    """``(n, M, K) @ (n, K, N)``; ``concrete``: on a CPU, and no tracer would take the batch for a number of groups."""
    batch, rows, inner = left.shape
    if not (
        concrete
        and left.dtype == right.dtype == torch.float32
        and suits(rows, inner)
        and left.is_contiguous()
        and right.is_contiguous()
    ):
        return torch.bmm(left, right)
    columns = right.shape[2]
    # A kernel of one has nothing to dilate; but PyTorch hands it to oneDNN, with one thread, only if it seems to.
    joined = F.conv1d(
        right.view(1, batch * inner, columns), left.view(batch * rows, inner, 1), groups=batch, dilation=2
    )
    return joined.view(batch, rows, columns)
