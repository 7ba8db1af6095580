"""Normalisations: the gradient of the weight is the sum of ``g * xhat`` over positions, that of the bias of ``g``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad._torch import functorch
from fastgrad.layers.call import Call, mixes_samples
from fastgrad.layers.formula import Formula, Tensors, positions_first, sqnorm, upcast


class OverLast(Formula):
    """A normalisation over the last ``trailing`` dimensions; ``normalized`` gives it without weight and bias."""

    name = "normalisation"

    def __init__(self, normalized: Callable[[Tensor], Tensor], trailing: int) -> None:
        self._normalized, self._trailing = normalized, trailing

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        a, g = upcast(saved[0], gradients[0])
        return positions_first(g if slot else g * self._normalized(a), self._trailing).sum(1)


class OverChannels(Formula):
    """A normalisation of channels, dimension 1, of ``images`` images a sample.

    ``statistics`` gives mean and scale of each image's channels, ``(n, C)`` or ``(C,)``.
    """

    def __init__(self, name: str, statistics: Callable[[Tensor], Tensors], images: int) -> None:
        self.name, self._statistics, self._images = name, statistics, images

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        return self._gradients(saved, gradients, [slot])[0]

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        return [sqnorm(gradient) for gradient in self._gradients(saved, gradients, slots)]

    def _gradients(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        a, g = upcast(saved[0], gradients[0])
        mean, scale = (x.to(a.dtype).expand(a.shape[:2]) for x in self._statistics(a))
        if a.dim() == 2 or functorch.is_batchedtensor(g) or not a.is_contiguous():
            ends = [*a.shape[:2], *[1] * (a.dim() - 2)]
            products = [g if slot else g * ((a - mean.reshape(ends)) * scale.reshape(ends)) for slot in slots]
            found = [p.flatten(2).sum(2) if p.dim() > 2 else p for p in products]
        else:
            # With images folded into channels, the reduction over (batch, positions) becomes one per image. One pass
            # over the two tensors then gives both sums.
            g, a = (x.contiguous().flatten(2).flatten(0, 1).unsqueeze(0) for x in (g, a))
            _, weight, bias = torch.ops.aten.native_batch_norm_backward(
                g, a, None, None, None, mean.flatten(), scale.flatten(), True, 0.0, [False, True, True]
            )
            found = [(bias if slot else weight).view(mean.shape) for slot in slots]
        return found if self._images == 1 else [x.unflatten(0, (-1, self._images)).sum(1) for x in found]


def batch_norm(
    call: Call, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.batch_norm`` with running statistics; without, it may standardise weights."""
    if not call.is_batched(input) or not call.serves(weight, bias) or running_mean is None or running_var is None:
        return NotImplemented
    if training:
        raise mixes_samples(
            "it normalises with the statistics of the batch (batch norm in training mode, or without running "
            "statistics; call model.eval(), or use group norm)"
        )
    mean, var = running_mean, running_var

    def statistics(x: Tensor) -> Tensors:
        return mean.detach(), (var.detach().to(x.dtype) + eps).rsqrt()

    return call.apply_to_images(
        lambda x: in_order(x, mean, var, weight, bias, False, momentum, eps), input, [weight, bias],
        lambda images: OverChannels("batch norm (evaluation)", statistics, images),
    )  # fmt: skip


def in_order(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return ``torch.nn.functional.batch_norm``, with a backward pass that is right for a single image.

    On a CPU, PyTorch's own is wrong where that image and its gradient lie in memory in different orders.
    """
    alone = len(input) == 1
    out = F.batch_norm(input.contiguous() if alone else input, *args, **kwargs)
    if alone and out.requires_grad:
        out.register_hook(Tensor.contiguous)
    return out


def group_norm(
    call: Call, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.group_norm``."""

    def run(x: Tensor) -> Tensor:
        return F.group_norm(x, num_groups, weight, bias, eps)

    return _of_groups(call, input, weight, bias, run, eps, num_groups)


def instance_norm(
    call: Call, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.instance_norm``, of images that have a dimension for samples."""
    if not use_input_stats:
        return batch_norm(call, input, running_mean, running_var, weight, bias, False, momentum, eps)
    tracks = running_mean is not None or running_var is not None
    # The batch's images write to the running statistics once, as in an ordinary call.
    if tracks and (not call.is_batched(input) or call.is_batched(running_mean) or input.shape[0] != 1):
        return NotImplemented

    def run(x: Tensor) -> Tensor:
        return F.instance_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)

    return _of_groups(call, input, weight, bias, run, eps)


def _of_groups(
    call: Call, input: Tensor, weight: Any, bias: Any, run: Callable[[Tensor], Tensor], eps: float, groups: int = 0
) -> Any:  # fmt: skip
    """Apply ``run(input)``, which normalises groups of an image's channels; 0: each by itself."""
    if not call.serves(weight, bias) or call.owns(input):
        return NotImplemented

    def statistics(x: Tensor) -> Tensors:
        n, channels, *places = x.shape
        _, mean, scale = torch.native_group_norm(
            x.contiguous(), None, None, n, channels, math.prod(places), groups or channels, eps
        )
        return [s.repeat_interleave(channels // s.shape[1], 1) for s in (mean, scale)]

    return call.apply_to_images(
        run, input, [weight, bias], lambda images: OverChannels("normalisation", statistics, images)
    )


def layer_norm(
    call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.layer_norm``."""

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, normalized_shape, weight, bias, eps)

    return _over_last(call, input, weight, bias, run, len(normalized_shape))


def rms_norm(
    call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.rms_norm``."""

    def run(x: Tensor, weight: Tensor | None, bias: None) -> Tensor:
        return F.rms_norm(x, normalized_shape, weight, eps)

    return _over_last(call, input, weight, None, run, len(normalized_shape))


def _over_last(call: Call, input: Tensor, weight: Any, bias: Any, run: Callable[..., Tensor], trailing: int) -> Any:
    """Apply ``run(input, weight, bias)``, which normalises over the last ``trailing`` dimensions."""
    if not call.serves(weight, bias) or call.owns(input):
        return NotImplemented
    formula = OverLast(lambda x: run(x, None, None), trailing)
    return call.apply(lambda x: run(x, weight, bias), input, [weight, bias], formula)
