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


class Kernel(NamedTuple):
    """What a convolution is called with, for each axis."""

    size: Ints
    stride: Ints
    padding: Ints  # zeros on both sides
    dilation: Ints
    groups: int = 1
    transposed: bool = False


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
    guarded: bool  # whether values may be looked at: elsewhere than on a CPU, this would wait for the device

    @property
    def inputs(self) -> int:
        """C, input channels per group."""
        return self.a.shape[1] // self.groups

    @property
    def outputs(self) -> int:
        """O, output channels per group."""
        return self.g.shape[2] // self.groups

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


def problem_of(a: Tensor, g: Tensor, kernel: Kernel) -> Problem:
    """Return the problem for inputs ``(B, C, *L)`` and K gradients of each sample's output, ``(K, B, O, *T)``."""
    if kernel.transposed:
        # y = conv_transpose(x): dL/dW[i, o, d] = sum_t x[i, t] gy[o, stride t + d]; the two swap roles.
        # Several gradients then share no activation, so they join the batch.
        a, g = g.flatten(0, 1), a.expand(len(g), *a.shape).flatten(0, 1).unsqueeze(0)
    axes = zip(a.shape[2:], g.shape[3:], *kernel[:4], strict=True)
    pads = tuple(
        (pad, (positions - 1) * step + gap * (taps - 1) + 1 - size - pad)
        for size, positions, taps, step, pad, gap in axes
    )
    return Problem(a, g, kernel.size, kernel.stride, kernel.dilation, pads, kernel.groups, a.device.type == "cpu")
