"""The one form every convolution is brought to before its per-sample squared norms are taken.

The weight gradient of any convolution, transposed or not, is a correlation of two images per sample,
``G[o, c, d] = sum_t g[o, t] a[c, stride * t + dilation * d]`` with ``t`` over positions and ``d`` over the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastgrad import checks

Ints = tuple[int, ...]


class Problem(NamedTuple):
    """A correlation of two images per sample.

    Attributes:
        a: ``(B, G * C, *size)``, not padded yet: padding a chunk while it is in cache is cheaper.
        g: ``(K, B, G * O, *T)`` with K gradients (contrasts) per sample.
        kernel: kernel size per axis.
        stride: stride per axis.
        dilation: dilation per axis.
        pads: zeros before and after each axis of ``a`` (negative crops), after which its size is exactly
            ``(T - 1) * stride + dilation * (kernel - 1) + 1``.
        groups: G.
    """

    a: Tensor
    g: Tensor
    kernel: Ints
    stride: Ints
    dilation: Ints
    pads: tuple[tuple[int, int], ...]
    groups: int

    @property
    def overlaps(self) -> bool:
        """Whether the patches hold more numbers than the padded image."""
        size = math.prod(int(n) + sum(pair) for n, pair in zip(self.a.shape[2:], self.pads, strict=True))
        return math.prod(self.kernel) * math.prod(map(int, self.g.shape[3:])) > size

    def padded(self) -> Tensor:
        """``a`` with the zeros written out."""
        flat = [side for pair in reversed(self.pads) for side in pair]
        return F.pad(self.a, flat) if any(flat) else self.a


def per_axis(name: str, value: int | Sequence[int], axes: int) -> Ints:
    """Expand an int to one per spatial axis, or check the length of a sequence."""
    if isinstance(value, int):
        return (value,) * axes
    result = tuple(value)
    if len(result) != axes:
        raise ValueError(f"{name} must be an int or {axes} ints, one per spatial axis; it was {result}")
    return result


def canonical(
    a: Tensor,
    g: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    transposed: bool,
) -> Problem:
    """Check the arguments of `fastgrad.ops.conv.sqnorm.conv_sqnorm`, with g ``(K, B, C_out, *spatial)``, and bring
    them to canonical form.

    Raises:
        ValueError: Naming the argument whose shape does not fit.
    """
    checks.same_device("g", g, "a", a)
    axes = a.dim() - 2
    if groups < 1 or a.shape[1] % groups or g.shape[2] % groups:
        raise ValueError(f"groups must divide the channels of a, {a.shape[1]}, and of g, {g.shape[2]}; it was {groups}")
    kernel = per_axis("kernel_size", kernel_size, axes)
    strides = per_axis("stride", stride, axes)
    pads = per_axis("padding", padding, axes)
    dilations = per_axis("dilation", dilation, axes)
    if transposed:
        # y = conv_transpose(x): dL/dW[i, o, d] = sum_t x[i, t] gy[o, stride t + d]; the two swap roles.
        # Several gradients then share no activation, so they join the batch.
        count, batch = g.shape[0], g.shape[1]
        x = a.expand(count, *a.shape) if count > 1 else a.unsqueeze(0)
        a, g = g.reshape(count * batch, *g.shape[2:]), x.reshape(1, count * batch, *a.shape[1:])
    if g.shape[1] != a.shape[0]:
        raise ValueError(f"g must have the batch size of a, {a.shape[0]}; its shape was {tuple(g.shape)}")
    pairs = []
    for axis in range(axes):
        size, out = int(a.shape[2 + axis]), int(g.shape[3 + axis])
        need = (out - 1) * strides[axis] + dilations[axis] * (kernel[axis] - 1) + 1
        if need > size + 2 * pads[axis]:
            raise ValueError(
                f"{'a' if transposed else 'g'} must fit the convolution: its {out} positions on axis {axis} "
                f"reach over {need} of {size + 2 * pads[axis]} padded ones"
            )
        pairs.append((pads[axis], need - size - pads[axis]))
    return Problem(a, g, kernel, strides, dilations, tuple(pairs), groups)
