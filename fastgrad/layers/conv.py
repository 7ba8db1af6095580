"""Convolutions of one to three dimensions, ordinary and transposed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad._torch import ConvNd, ConvTransposeNd, padding_pairs
from fastgrad.layers.choice import implementation
from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.layers.registry import LayerRule
from fastgrad.ops.layer_sqnorm import conv_sqnorm


def _padded(module: ConvNd, a: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input as the convolution sees it, and the zero padding still to be done."""
    rank = len(module.kernel_size)
    if module.padding_mode != "zeros":
        return F.pad(a, padding_pairs(module), mode=module.padding_mode), (0,) * rank
    if module.padding == "valid":
        return a, (0,) * rank
    if module.padding == "same":
        pads = padding_pairs(module)
        left, right = tuple(pads[::2][::-1]), tuple(pads[1::2][::-1])
        return (a, left) if left == right else (F.pad(a, pads), (0,) * rank)
    assert not isinstance(module.padding, str)
    return a, tuple(module.padding)


def _pointwise_input_gradient(module: nn.Module, a: Tensor) -> Callable[[Tensor], Tensor] | None:
    """For kernel 1 and a stride: the few pixels that were read get a gradient, the rest is zero.

    The library's own backward pass of such a layer takes two to three times as long on a CPU.
    """
    assert isinstance(module, ConvNd)
    strided = (
        a.device.type == "cpu"
        and a.dim() == 4
        and not isinstance(module, ConvTransposeNd)
        and module.groups == 1
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.padding in ("valid", "same", (0, 0))
    )
    if not strided:
        return None
    weight, (down, across), shape = module.weight, module.stride, a.shape

    def backward(g: Tensor) -> Tensor:
        pixels = F.conv2d(g, weight.transpose(0, 1))
        full = g.new_zeros((g.shape[0], *shape[1:]))
        full[:, :, ::down, ::across] = pixels
        return full

    return backward


def convolution(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for all convolutions of ``torch.nn``."""
    assert isinstance(module, ConvNd)
    norms = {}
    if module.bias is not None:
        norms["bias"] = sqnorm(upcast(g)[0].flatten(2).sum(2))
    a, padding = _padded(module, a)
    norms["weight"] = conv_sqnorm(
        a,
        g,
        tuple(module.kernel_size),
        tuple(module.stride),
        padding,
        tuple(module.dilation),
        module.groups,
        transposed=isinstance(module, ConvTransposeNd),
        impl=implementation(),
    )
    return norms


def _settings(module: nn.Module) -> Hashable:
    """All of a module that the rule depends on."""
    assert isinstance(module, ConvNd)
    geometry = module.kernel_size, module.stride, module.padding, module.dilation, module.groups
    return (*geometry, module.padding_mode, module.bias is None, isinstance(module, ConvTransposeNd))


CONVOLUTION = LayerRule(
    "convolution", convolution, in_place=True, input_gradient=_pointwise_input_gradient, alike=_settings
)
