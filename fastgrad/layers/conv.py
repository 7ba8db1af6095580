"""Convolutions of one to three dimensions, ordinary and transposed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad._torch import next_number
from fastgrad.layers.call import Call
from fastgrad.layers.formula import Formula, Tensors
from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.ops.conv.geometry import per_axis
from fastgrad.ops.conv.sqnorm import conv_sqnorm
from fastgrad.ops.dispatch import implementation

Ints = tuple[int, ...]


class Options(NamedTuple):
    """What a convolution is called with, for each axis; ``images`` of a sample share the weight."""

    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    extra: Ints  # output_padding
    groups: int
    transposed: bool
    images: int


class Convolution(Formula):
    """A convolution of ``images`` images a sample, ``(B * images, C, *L)``."""

    name = "convolution"

    def __init__(self, options: Options, shape: Ints) -> None:
        self._options, self._shape = options, shape

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        o, a, g = self._options, saved[0], gradients[0]
        if o.images > 1:  # one more axis, whose kernel is 1, sums over them
            a, g = (t.unflatten(0, (-1, o.images)).movedim(1, 2) for t in (a, g))
            o = o._replace(kernel=(1, *o.kernel), stride=(1, *o.stride), padding=(0, *o.padding))
            o = o._replace(dilation=(1, *o.dilation))
        return [
            sqnorm(upcast(g)[0].flatten(2).sum(2))
            if slot
            else conv_sqnorm(
                a, g, o.kernel, o.stride, o.padding, o.dilation, o.groups,
                transposed=o.transposed, impl=implementation.get(),
            )
            for slot in slots
        ]  # fmt: skip

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        o = self._options
        a, g = upcast(saved[0], gradients[0])
        a, g = (t.unflatten(0, (-1, o.images)) for t in (a, g))
        if slot:
            bias: Tensor = g.flatten(3).sum((1, 3))
            return bias
        samples, weight = a.shape[0], a.new_empty(self._shape)
        each = [
            torch.ops.aten.convolution_backward(
                g[i], a[i], weight, None, o.stride, o.padding, o.dilation, o.transposed, o.extra, o.groups,
                [False, True, False],
            )[1]
            for i in range(samples)
        ]  # fmt: skip
        return torch.stack(each)


@functools.lru_cache(maxsize=4096)
def _formula(options: Options, shape: Ints) -> Convolution:
    return Convolution(options, shape)


@functools.lru_cache(maxsize=4096)
def _same(kernel: Ints, dilation: Ints) -> tuple[Ints, tuple[int, ...] | None]:
    """Return the padding "same": zeros on both sides, and if the sides differ, those to write out, last axis first."""
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return tuple(total // 2 for total in totals), None
    return (0,) * len(kernel), tuple(half for t in reversed(totals) for half in (t // 2, t - t // 2))


def conv(
    function: Callable[..., Tensor],
    axes: int,
    transposed: bool,
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    *rest: Any,
    **options: Any,
) -> Any:
    """Rule for all convolutions: ``function`` of ``axes`` dimensions."""
    if not call.owns(weight) or not call.serves(bias) or call.owns(input) or input.dim() != axes + 2:
        return NotImplemented
    names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = {**dict(zip(names, rest, strict=False)), **options}
    shape = tuple(weight.shape)
    kernel, groups = shape[2:], given.get("groups", 1)
    steps, gaps = per_axis(stride, axes), per_axis(given.get("dilation", 1), axes)
    extra, written = per_axis(given.get("output_padding", 0), axes), None
    if padding == "same":
        pads, written = _same(kernel, gaps)
    else:
        pads = (0,) * axes if isinstance(padding, str) else per_axis(padding, axes)

    def on_batch() -> Any:
        begin = next_number()
        x = call.physical(input)
        x = call.spread(input, x)
        images = x.shape[1]
        x = x.flatten(0, 1)
        if written is not None:
            x = F.pad(x, written)
        if transposed:
            out = function(x, weight, bias, steps, pads, extra, groups, gaps)
        else:
            out = function(x, weight, bias, steps, pads, gaps, groups)
        formula = _formula(Options(kernel, steps, pads, gaps, extra, groups, transposed, images), shape)
        return call.tapped([out], [x], [weight, bias], formula, begin)[0].unflatten(0, (call.samples, images))

    return call.on_batch(on_batch)


_PLAIN: tuple[Any, ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED: tuple[Any, ...] = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
#: By the function, its rule.
CONVOLUTIONS: dict[Any, Callable[..., Any]] = {
    function: functools.partial(conv, function, axes, functions is _TRANSPOSED)
    for functions in (_PLAIN, _TRANSPOSED)
    for axes, function in enumerate(functions, 1)
}
