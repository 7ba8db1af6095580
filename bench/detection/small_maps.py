"""A convolution on small maps as a matrix product, for training.

A processor's matrix units work on rows of 16 positions or so; the library's convolution gives them rows of one image,
of which the last stage of a ResNet-18 for 32 pixels has 4. One product whose rows are all positions of all images fills
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

#: Positions along an axis up to which a product is faster.
_SMALL = 6


def _patches(x: Tensor, stride: int) -> Tensor:
    """The 3x3 neighbourhood of every output position: ``(B, C, H, W)`` to ``(B * H' * W', 9 * C)``."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    batch, rows, columns, channels = x.shape
    b, r, c, _ = x.stride()
    shape = (batch, (rows - 3) // stride + 1, (columns - 3) // stride + 1, 3, 3, channels)
    return x.as_strided(shape, (b, r * stride, c * stride, r, c, 1)).reshape(-1, 9 * channels)


def _times(patches: Tensor, weight: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """A convolution of what `_patches` gives with ``weight`` ``(O, C, 3, 3)``: ``(B, O, H', W')``, channels last."""
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    return (patches @ matrix.T).view(batch, rows, columns, -1).permute(0, 3, 1, 2)


class _Product(torch.autograd.Function):
    """A 3x3 convolution that pads by 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, H', W')``, channels last."""
        patches = _patches(x, stride)
        ctx.save_for_backward(x, weight, patches)
        ctx.stride = stride
        rows, columns = ((length - 1) // stride + 1 for length in x.shape[2:])
        return _times(patches, weight, len(x), rows, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Of the input, where it is asked for, and of the weight."""
        x, weight, patches = ctx.saved_tensors
        flat = grad.permute(0, 2, 3, 1).flatten(0, 2)
        of_weight = (flat.T @ patches).view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        of_input = None
        if ctx.needs_input_grad[0] and ctx.stride == 1:
            flipped = weight.flip(2, 3).transpose(0, 1)
            of_input = _times(_patches(grad, 1), flipped, len(x), *x.shape[2:])
        elif ctx.needs_input_grad[0]:
            of_input = conv2d_input(list(x.shape), weight, grad, ctx.stride, 1)
        return of_input, of_weight, None


class _SmallMapConv(nn.Conv2d):
    """A 3x3 convolution that takes the product where its map is small; weights and results are a convolution's."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, H', W')``."""
        stride, weight = self.stride[0], self.weight
        if x.device.type != "cpu" or max(x.shape[2:]) > _SMALL * stride:
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        result: Tensor = _Product.apply(x, weight, stride)  # type: ignore[no-untyped-call]
        return result


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or module.bias is not None or module.groups != 1:
        return False
    sides = (module.kernel_size, module.padding, module.dilation)
    return sides == ((3, 3), (1, 1), (1, 1)) and module.stride[0] == module.stride[1]


@contextmanager
def products(model: nn.Module) -> Iterator[None]:
    """Within it, 3x3 convolutions of ``model`` are products on small maps."""
    convolutions = [module for module in model.modules() if _fits(module)]
    try:
        for module in convolutions:
            module.__class__ = _SmallMapConv
        yield
    finally:
        for module in convolutions:
            module.__class__ = nn.Conv2d
