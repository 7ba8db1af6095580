"""The one form that every convolution is brought to before its per-sample squared norms are computed.

The weight gradient of any convolution, transposed or not, is a correlation of two images per sample,
``G[o, c, d] = sum_t g[o, t] a[c, stride * t + dilation * d]`` with ``t`` over positions and ``d`` over the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

Ints = tuple[int, ...]


class Problem(NamedTuple):
    """A correlation of two images per sample."""

    a: Tensor  # (B, G * C, *size), not padded yet: padding a chunk while it is in cache is cheaper
    g: Tensor  # (K, B, G * O, *T) with K gradients (contrasts) per sample
    kernel: Ints  # of each axis
    stride: Ints
    dilation: Ints
    # Zeros before and after each axis of a (negative crops), after which its size is exactly
    # (T - 1) * stride + dilation * (kernel - 1) + 1.
    pads: tuple[tuple[int, int], ...]
    groups: int  # G

    @property
    def positions(self) -> Ints:
        """T, the output size per axis."""
        return tuple(map(int, self.g.shape[3:]))

    @property
    def pixels(self) -> int:
        """Number of pixels of the padded image."""
        return math.prod(int(n) + sum(pair) for n, pair in zip(self.a.shape[2:], self.pads, strict=True))

    @property
    def image(self) -> Ints:
        """Size of the image per axis without padding, as far as windows reach."""
        return tuple(int(n) + min(0, after) for n, (_, after) in zip(self.a.shape[2:], self.pads, strict=True))

    @property
    def overlaps(self) -> bool:
        """Whether the patches hold more numbers than the padded image."""
        return math.prod(self.kernel) * math.prod(self.positions) > self.pixels

    def padded(self) -> Tensor:
        """Return ``a`` with the zeros written out."""
        flat = [side for pair in reversed(self.pads) for side in pair]
        return F.pad(self.a, flat) if any(flat) else self.a


def per_axis(value: int | Sequence[int], axes: int) -> Ints:
    """Return one int for each spatial axis; PyTorch also takes a single one for all."""
    each = (value,) if isinstance(value, int) else tuple(value)
    return each * axes if len(each) == 1 else each


def padding_of(
    a: Ints, g: Ints, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int, swapped: bool
) -> tuple[tuple[int, int], ...]:
    """Return the zeros before and after each axis of inputs ``(B, C, *L)``, for gradients ``(K, B, O, *T)``.

    For a transposed convolution the two are ``swapped``.

    Raises:
        ValueError: Naming the argument whose shape does not fit.
    """
    if groups < 1 or a[1] % groups or g[2] % groups:
        raise ValueError(f"groups must divide the channels of a, {a[1]}, and of g, {g[2]}; it was {groups}")
    if g[1] != a[0]:
        raise ValueError(f"g must have the batch size of a, {a[0]}; its shape was {g}")
    pads = []
    for axis, (pad, step, gap, kernel) in enumerate(zip(padding, stride, dilation, kernel_size, strict=True)):
        size, out = a[2 + axis], g[3 + axis]
        need = (out - 1) * step + gap * (kernel - 1) + 1
        if need > size + 2 * pad:
            raise ValueError(
                f"{'a' if swapped else 'g'} must fit the convolution: its {out} positions on axis {axis} "
                f"reach over {need} of {size + 2 * pad} padded ones"
            )
        pads.append((pad, need - size - pad))
    return tuple(pads)
