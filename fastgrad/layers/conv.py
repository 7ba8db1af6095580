"""Convolutions of one to three dimensions, ordinary and transposed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad._torch import ConvNd, ConvTransposeNd, padding_pairs
from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.layers.registry import InputGradient, LayerRule
from fastgrad.ops.conv.sqnorm import conv_sqnorm
from fastgrad.ops.dispatch import implementation

#: ``(module, input) -> (input, zeros before and after each axis)``, last axis first as for ``torch.nn.functional.pad``.
Padding = Callable[[ConvNd, Tensor], tuple[Tensor, Sequence[int]]]


def _own(module: ConvNd, a: Tensor) -> tuple[Tensor, Sequence[int]]:
    """As ``torch.nn`` pads."""
    pads = padding_pairs(module)
    if module.padding_mode != "zeros":
        return F.pad(a, pads, mode=module.padding_mode), [0] * len(pads)
    return a, pads


def _same(module: ConvNd, a: Tensor) -> tuple[Tensor, Sequence[int]]:
    """TensorFlow's ``SAME``: a stride s leaves ``ceil(n / s)`` places of n; the odd zero comes after."""
    pads: list[int] = []
    axes = zip(a.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    for n, kernel, stride, dilation in reversed(list(axes)):
        total = max((-(-n // stride) - 1) * stride + dilation * (kernel - 1) + 1 - n, 0)
        pads += [total // 2, total - total // 2]
    return a, pads


def _stored(module: ConvNd, a: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Likewise for the image size that was named beforehand, by a layer that pads or one that does nothing."""
    return a, [
        sum(pair) for pair in zip(_zeros_of(module.static_padding), padding_pairs(module), strict=True)
    ]


def _zeros_of(layer: Any) -> Sequence[int]:
    return tuple(layer.padding) if isinstance(layer, nn.ZeroPad2d) else (0, 0, 0, 0)


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


def _norms(padding: Padding, module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    assert isinstance(module, ConvNd)
    norms = {}
    if module.bias is not None:
        norms["bias"] = sqnorm(upcast(g)[0].flatten(2).sum(2))
    a, pads = padding(module, a)
    before, after = tuple(pads[::2][::-1]), tuple(pads[1::2][::-1])
    if before != after:
        a, before = F.pad(a, list(pads)), (0,) * len(before)
    norms["weight"] = conv_sqnorm(
        a,
        g,
        tuple(module.kernel_size),
        tuple(module.stride),
        before,
        tuple(module.dilation),
        module.groups,
        transposed=isinstance(module, ConvTransposeNd),
        impl=implementation(),
    )
    return norms


def _rule(name: str, padding: Padding, input_gradient: InputGradient | None = None) -> LayerRule:
    norms = functools.partial(_norms, padding)
    return LayerRule(name, norms, in_place=True, input_gradient=input_gradient)


#: Of all convolutions of ``torch.nn``.
CONVOLUTION = _rule("convolution", _own, _pointwise_input_gradient)
#: Of subclasses that pad in their ``forward``.
SAME_CONVOLUTION = _rule("convolution, same padding", _same)
STORED_CONVOLUTION = _rule("convolution, stored padding", _stored)
