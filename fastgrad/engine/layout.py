"""Where the batch lies in a tensor, found from what changes when it has a sample less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Samples that a network is watched on. Only the gradient of the middle one is sent back, so wherever it arrives
#: shows the place of a sample's numbers in that tensor.
SAMPLES = 3
_MIDDLE = 1


@dataclass(frozen=True)
class Layout:
    """Where the batch lies in a layer's tensors.

    ``plain``: dimension 0. ``folded``: dimension 0 holds several rows per sample, sample by sample. ``moved``:
    dimension ``dim``. ``single``: dimension 0 has size 1 and is broadcast over the batch later on.
    """

    kind: Literal["plain", "folded", "moved", "single"]
    dim: int = 0

    def batch_first(self, x: Tensor, samples: int) -> Tensor:
        """``x`` as a tensor with the batch in dimension 0, further rows of a sample in dimension 1."""
        if self.kind == "folded":
            return x.reshape(samples, -1, *x.shape[1:])
        if self.kind == "moved":
            return x.movedim(self.dim, 0)
        if self.kind == "single":
            return x.expand(samples, *x.shape[1:])
        return x


def find_layout(shape: tuple[int, ...], other: tuple[int, ...], gradient: Tensor | None) -> Layout | None:
    """Place of the batch from a tensor's shapes at three and two samples and the middle sample's gradient."""
    if len(shape) != len(other) or not shape:
        return None
    changed = [d for d, (three, two) in enumerate(zip(shape, other, strict=True)) if three != two]
    if not changed:
        return Layout("single") if shape[0] == 1 and len(shape) > 1 else None
    if len(changed) > 1:
        return None
    dim = changed[0]
    rows, remainder = divmod(shape[dim], SAMPLES)
    if remainder or other[dim] != rows * (SAMPLES - 1):
        return None
    if gradient is not None and not _block_only(gradient, dim, rows):
        return None
    if rows == 1:
        return Layout("plain") if dim == 0 else Layout("moved", dim)
    return Layout("folded") if dim == 0 else None


def _block_only(gradient: Tensor, dim: int, rows: int) -> bool:
    """Whether the gradient vanishes outside the middle sample's rows of one dimension."""
    outside = gradient.detach().clone()
    outside.narrow(dim, _MIDDLE * rows, rows).zero_()
    return not bool(outside.any())


def middle_row(out: Tensor, fewer: Tensor) -> Tensor | None:
    """A fixed gradient for the middle of three samples; None for an output without the batch."""
    layout = find_layout(tuple(out.shape), tuple(fewer.shape), None)
    if layout is None or layout.kind == "single":
        return None
    rows = out.shape[layout.dim] // SAMPLES
    pattern = torch.cos(torch.arange(out.numel(), device=out.device, dtype=torch.float64) * 1.7 + 0.3)
    keep = torch.zeros(out.shape[layout.dim], device=out.device, dtype=torch.float64)
    keep.narrow(0, _MIDDLE * rows, rows).fill_(1)
    shape = [1] * out.dim()
    shape[layout.dim] = -1
    return (pattern.reshape(out.shape) * keep.reshape(shape)).to(out.dtype)
