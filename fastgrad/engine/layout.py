"""Where the batch lies in a tensor, found from what changes if it has one sample less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Samples that a network is observed on. Only the gradient of one is sent back, so where it arrives in a tensor shows
#: the place of this sample. The second of four is elsewhere in a reversed batch. It also has samples before and after
#: it, to which a model that mixes samples would carry its gradient.
SAMPLES = 4
CHOSEN = 1


@dataclass(frozen=True)
class Layout:
    """Where the batch lies in a layer's tensors.

    ``plain``: dimension 0. ``folded``: dimension 0 holds several rows per sample, sample by sample. ``moved``:
    dimension ``dim``. ``single``: dimension 0 has size 1 and is broadcast over the batch later on.
    """

    kind: Literal["plain", "folded", "moved", "single"]
    dim: int = 0

    def holds(self, x: Tensor, samples: int) -> bool:
        """Whether ``x`` may hold this number of samples there."""
        if x.dim() <= self.dim:
            return False
        rows = x.shape[self.dim]
        if self.kind == "folded":
            return bool(rows % samples == 0)
        return bool(rows == (1 if self.kind == "single" else samples))

    def batch_first(self, x: Tensor, samples: int) -> Tensor:
        """Return ``x`` with the batch in dimension 0, and several rows of one sample in dimension 1."""
        if self.kind == "folded":
            return torch.unflatten(x, 0, (samples, -1))
        if self.kind == "moved":
            return x.movedim(self.dim, 0)
        if self.kind == "single":
            return x.expand(samples, *x.shape[1:])
        return x


def find_layout(shape: tuple[int, ...], other: tuple[int, ...], gradient: Tensor | None, samples: int) -> Layout | None:
    """Return where the batch lies in a tensor of ``shape`` for ``samples``, 2 at least, and ``other`` for one less.

    ``gradient`` is the tensor's for the chosen sample alone, and must be zero outside of its rows.
    """
    if len(shape) != len(other) or not shape:
        return None
    changed = [d for d, (more, less) in enumerate(zip(shape, other, strict=True)) if more != less]
    if not changed:
        return Layout("single") if shape[0] == 1 and len(shape) > 1 else None
    if len(changed) > 1:
        return None
    dim = changed[0]
    rows, remainder = divmod(shape[dim], samples)
    if remainder or other[dim] != rows * (samples - 1):
        return None
    if gradient is not None:
        outside = gradient.detach().clone()
        outside.narrow(dim, CHOSEN * rows, rows).zero_()
        if bool(outside.any()):
            return None
    if rows == 1:
        return Layout("plain") if dim == 0 else Layout("moved", dim)
    return Layout("folded") if dim == 0 else None


def probe_cotangent(out: Tensor, layout: Layout | None, samples: int, chosen: int) -> Tensor:
    """Return a fixed gradient for one of the ``samples`` of an output; zeros for an output without the batch."""
    if layout is None or layout.kind == "single":
        return torch.zeros_like(out)
    numbers = torch.arange(out.numel(), device=out.device, dtype=torch.float64)
    # No two values are alike.
    pattern = torch.cos(numbers * 1.7 + 0.3).reshape(out.shape).to(out.dtype)
    rows = out.shape[layout.dim] // samples
    place = (layout.dim, chosen * rows, rows)
    cotangent = torch.zeros_like(out)
    cotangent.narrow(*place).copy_(pattern.narrow(*place))
    return cotangent
