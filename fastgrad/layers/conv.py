"""Convolutions of one to three dimensions, ordinary and transposed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad._torch import ConvNd, ConvTransposeNd, along_axes, padding_pairs
from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.layers.registry import LayerRule
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
    stored = module.static_padding.padding if isinstance(module.static_padding, nn.ZeroPad2d) else (0, 0, 0, 0)
    return a, [sum(pair) for pair in zip(stored, padding_pairs(module), strict=True)]


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
        tuple(module.weight.shape[2:]),
        along_axes(module.stride, len(before)),
        before,
        along_axes(module.dilation, len(before)),
        module.groups,
        transposed=isinstance(module, ConvTransposeNd),
        impl=implementation(),
    )
    return norms


#: Of all convolutions of ``torch.nn``.
CONVOLUTION = LayerRule("convolution", functools.partial(_norms, _own), in_place=True)
#: Of subclasses that pad in their ``forward``.
SAME_CONVOLUTION = LayerRule("convolution, same padding", functools.partial(_norms, _same), in_place=True)
STORED_CONVOLUTION = LayerRule("convolution, stored padding", functools.partial(_norms, _stored), in_place=True)
