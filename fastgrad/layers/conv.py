"""Convolutions of one to three dimensions, ordinary and transposed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.layers.call import Call
from fastgrad.layers.formula import Formula, Tensors, sqnorm, upcast
from fastgrad.ops.conv.geometry import Ints, Kernel, per_axis
from fastgrad.ops.conv.gradient import conv_factors, conv_gradient
from fastgrad.ops.conv.sqnorm import conv_sqnorm
from fastgrad.ops.dispatch import implementation


class Convolution(Formula):
    """A convolution of ``images`` images a sample, ``(B * images, C, *L)``."""

    name = "convolution"

    def __init__(self, kernel: Kernel, images: int) -> None:
        self._kernel, self._images = kernel, images
        if images > 1:
            # One more axis, whose kernel is 1, sums over images.
            sizes = (1, *kernel.size), (1, *kernel.stride), (0, *kernel.padding), (1, *kernel.dilation)
            self._kernel = Kernel(*sizes, kernel.groups, kernel.transposed)

    def _of_samples(self, saved: Tensors, gradients: Tensors) -> tuple[Tensor, Tensor, Kernel]:
        """Return inputs and output gradients of samples, ``(B, C, *L)``, and the convolution's kernel."""
        a, g = saved[0], gradients[0]
        if self._images > 1:
            a, g = (t.unflatten(0, (-1, self._images)).movedim(1, 2) for t in (a, g))
        return a, g, self._kernel

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        a, g, kernel = self._of_samples(saved, gradients)
        return [sqnorm(_bias(g)) if slot else conv_sqnorm(a, g, kernel, impl=implementation.get()) for slot in slots]

    def part(self, saved: Tensors, gradients: Tensors, slot: int, at: slice) -> Tensor:
        a, g, kernel = self._of_samples(saved, gradients)
        if slot:
            return _bias(g)[:, at]
        found = conv_gradient(a, g, kernel, at)
        return found.squeeze(3) if self._images > 1 else found

    def positions(self, saved: Tensors, gradients: Tensors, slot: int) -> int:
        image = saved[0] if self._kernel.transposed else gradients[0]
        return 0 if slot or self._kernel.groups > 1 else math.prod(image.shape[2:]) * self._images

    def factors(self, saved: Tensors, gradients: Tensors, slot: int) -> tuple[Tensor, Tensor]:
        return conv_factors(*self._of_samples(saved, gradients))


def _bias(g: Tensor) -> Tensor:
    """Return each sample's gradient of the bias."""
    return upcast(g)[0].flatten(2).sum(2)


def _same(kernel: Ints, dilation: Ints) -> tuple[Ints, tuple[int, ...] | None]:
    """Return the padding "same": zeros on both sides, and if the sides differ, those to write out, last axis first."""
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return tuple(total // 2 for total in totals), None
    return (0,) * len(kernel), tuple(half for t in reversed(totals) for half in (t // 2, t - t // 2))


def conv(
    function: Callable[..., Tensor], axes: int, transposed: bool, call: Call, input: Tensor, weight: Tensor,
    bias: Tensor | None = None, stride: int | Sequence[int] = 1, padding: str | int | Sequence[int] = 0, *rest: Any,
    **options: Any,
) -> Any:  # fmt: skip
    """Rule for all convolutions: ``function`` of ``axes`` dimensions."""
    if not call.owns(weight) or not call.serves(bias) or call.owns(input) or input.dim() != axes + 2:
        return NotImplemented
    names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = {**dict(zip(names, rest, strict=False)), **options}
    kernel, groups = tuple(weight.shape[2:]), given.get("groups", 1)
    steps, gaps = per_axis(stride, axes), per_axis(given.get("dilation", 1), axes)
    extra, written = per_axis(given.get("output_padding", 0), axes), None
    if padding == "same":
        pads, written = _same(kernel, gaps)
    else:
        pads = (0,) * axes if isinstance(padding, str) else per_axis(padding, axes)

    def run(x: Tensor) -> Tensor:
        last = (extra, groups, gaps) if transposed else (gaps, groups)
        return function(x, weight, bias, steps, pads, *last)

    formula = functools.partial(Convolution, Kernel(kernel, steps, pads, gaps, groups, transposed))
    return call.apply_to_images(run, input if written is None else F.pad(input, written), [weight, bias], formula)


_PLAIN: tuple[Any, ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED: tuple[Any, ...] = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
#: By the function, its rule.
CONVOLUTIONS: dict[Any, Callable[..., Any]] = {
    function: functools.partial(conv, function, axes, functions is _TRANSPOSED)
    for functions in (_PLAIN, _TRANSPOSED)
    for axes, function in enumerate(functions, 1)
}
