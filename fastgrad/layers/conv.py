"""Convolutions of one to three dimensions, ordinary and transposed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fastgrad.layers.choice import implementation
from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.layers.registry import register_rule
from fastgrad.ops.layer_sqnorm import conv_sqnorm


def _padded(module: _ConvNd, a: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input as the convolution sees it, and the zero padding still to be done."""
    rank = len(module.kernel_size)
    if module.padding_mode != "zeros":
        return F.pad(a, module._reversed_padding_repeated_twice, mode=module.padding_mode), (0,) * rank
    if module.padding == "valid":
        return a, (0,) * rank
    if module.padding == "same":
        pads = module._reversed_padding_repeated_twice
        left, right = tuple(pads[::2][::-1]), tuple(pads[1::2][::-1])
        return (a, left) if left == right else (F.pad(a, pads), (0,) * rank)
    assert not isinstance(module.padding, str)
    return a, tuple(module.padding)


@register_rule(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    name="convolution",
    in_place=True,
)
def convolution(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for all convolutions of ``torch.nn``."""
    assert isinstance(module, _ConvNd)
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
        transposed=isinstance(module, _ConvTransposeNd),
        impl=implementation(),
    )
    return norms
