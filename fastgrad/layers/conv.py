"""Convolutions of one to three dimensions, ordinary and transposed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad._torch import ConvNd, ConvTransposeNd, padding_pairs
from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.layers.registry import LayerRule
from fastgrad.ops.conv.geometry import per_axis
from fastgrad.ops.conv.sqnorm import conv_sqnorm
from fastgrad.ops.dispatch import implementation

#: ``(module, input) -> (input, zeros before and after each axis)``, last axis first as for ``torch.nn.functional.pad``.
Padding = Callable[[ConvNd, Tensor], tuple[Tensor, Sequence[int]]]


def _geometry(module: ConvNd) -> tuple[tuple[int, ...], ...]:
    """Return kernel, stride and dilation of each axis as a call reads them: they may be set after construction."""
    kernel = tuple(module.weight.shape[2:])
    axes = len(kernel)
    return kernel, per_axis(module.stride, axes), per_axis(module.dilation, axes)


def _split(totals: Sequence[int]) -> list[int]:
    """Split the total zeros of each axis over its two ends, last axis first; an odd one comes after."""
    return [part for total in reversed(totals) for part in (total // 2, total - total // 2)]


def _zeros(module: ConvNd) -> list[int]:
    """Return the zeros that ``torch.nn`` adds for ``padding``, last axis first."""
    kernel, _, dilation = _geometry(module)
    if module.padding == "same":
        return _split([d * (k - 1) for k, d in zip(kernel, dilation, strict=True)])
    both = 0 if isinstance(module.padding, str) else module.padding
    return _split([2 * size for size in per_axis(both, len(kernel))])


def _own(module: ConvNd, a: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Pad as ``torch.nn`` does."""
    if module.padding_mode != "zeros":
        pads = padding_pairs(module)
        return F.pad(a, pads, mode=module.padding_mode), [0] * len(pads)
    return a, _zeros(module)


def _same(module: ConvNd, a: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Pad as TensorFlow's ``SAME``: a stride s turns n positions into ``ceil(n / s)``."""
    axes = zip(a.shape[2:], *_geometry(module), strict=True)
    return a, _split([max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in axes])


def _stored(module: ConvNd, a: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Pad by ``static_padding``, made for one image size (a layer that pads, or an identity), and by ``padding``."""
    stored = module.static_padding.padding if isinstance(module.static_padding, nn.ZeroPad2d) else (0, 0, 0, 0)
    return a, [sum(pair) for pair in zip(stored, _zeros(module), strict=True)]


def _norms(padding: Padding, module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    assert isinstance(module, ConvNd)
    norms = {}
    if module.bias is not None:
        norms["bias"] = sqnorm(upcast(g)[0].flatten(2).sum(2))
    a, pads = padding(module, a)
    before, after = tuple(pads[::2][::-1]), tuple(pads[1::2][::-1])
    if before != after:
        a, before = F.pad(a, list(pads)), (0,) * len(before)
    kernel, stride, dilation = _geometry(module)
    norms["weight"] = conv_sqnorm(
        a, g, kernel, stride, before, dilation, module.groups,
        transposed=isinstance(module, ConvTransposeNd), impl=implementation.get(),
    )  # fmt: skip
    return norms


#: For all convolutions of ``torch.nn``.
CONVOLUTION = LayerRule("convolution", functools.partial(_norms, _own), in_place=True)
#: For subclasses that pad in their ``forward``.
SAME_CONVOLUTION = LayerRule("convolution, same padding", functools.partial(_norms, _same), in_place=True)
STORED_CONVOLUTION = LayerRule("convolution, stored padding", functools.partial(_norms, _stored), in_place=True)
