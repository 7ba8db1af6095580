"""Normalisations: the gradient of the weight is the sum of ``g * xhat`` over positions, that of the bias of ``g``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad._torch import functorch
from fastgrad.layers.call import Call, mixes_samples
from fastgrad.layers.formula import Formula, Tensors, positions_first, sqnorm, upcast


class Normalisation(Formula):
    """A normalisation over channels in dimension 1, of ``images`` images a sample, or over the last dimensions.

    ``normalized`` gives the normalised input, without weight and bias; ``trailing`` is the number of dimensions at the
    end that it normalises over, 0 for channels.
    """

    name = "normalisation"

    def __init__(self, normalized: Callable[[Tensor], Tensor], trailing: int, images: int) -> None:
        self._normalized, self._trailing, self._images = normalized, trailing, images

    def gradient(self, saved: Tensors, gradients: Tensors, slot: int) -> Tensor:
        a, g = upcast(saved[0], gradients[0])
        product = g if slot else g * self._normalized(a)
        if self._trailing:
            return positions_first(product, self._trailing).sum(1)
        product = product.flatten(2).sum(2) if product.dim() > 2 else product
        return product if self._images == 1 else product.unflatten(0, (-1, self._images)).sum(1)


class BatchNorm(Normalisation):
    """Batch norm with running statistics."""

    name = "batch norm (evaluation)"

    def __init__(self, mean: Tensor, var: Tensor, eps: float, images: int) -> None:
        super().__init__(self._by_statistics, 0, images)
        self._mean, self._var, self._eps = mean.detach(), var.detach(), eps

    def _by_statistics(self, a: Tensor) -> Tensor:
        normalized: Tensor = F.batch_norm(a, self._mean.to(a.dtype), self._var.to(a.dtype), eps=self._eps)
        return normalized

    def sqnorms(self, saved: Tensors, gradients: Tensors, slots: Sequence[int]) -> list[Tensor]:
        (a,), (g,) = saved, gradients
        if self._images > 1 or a.dim() == 2 or functorch.is_batchedtensor(g) or not a.is_contiguous():
            return super().sqnorms(saved, gradients, slots)
        # With samples folded into channels, the reduction over (batch, positions) becomes one per sample. One pass over
        # the two tensors then gives both sums.
        a, g = upcast(a, g)
        samples, channels = a.shape[:2]
        g, a = (x.contiguous().view(1, samples * channels, -1) for x in (g, a))
        mean, var = (x.to(a.dtype).expand(samples, -1).reshape(-1) for x in (self._mean, self._var))
        _, weight, bias = torch.ops.aten.native_batch_norm_backward(
            g, a, None, mean, var, None, None, False, self._eps, [False, True, True]
        )
        return [sqnorm((bias if slot else weight).view(samples, channels)) for slot in slots]


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
            "statistics; call model.eval())"
        )
    mean, var = running_mean, running_var
    return call.apply_to_images(
        lambda x: in_order(x, mean, var, weight, bias, False, momentum, eps), input, [weight, bias],
        lambda images: BatchNorm(mean, var, eps, images),
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
    return _by_own_statistics(call, input, weight, bias, lambda x, w, b: F.group_norm(x, num_groups, w, b, eps))


def instance_norm(
    call: Call, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.instance_norm``, of images that have a dimension for samples."""
    if not use_input_stats:
        return batch_norm(call, input, running_mean, running_var, weight, bias, False, momentum, eps)

    def run(x: Tensor, w: Any, b: Any, mean: Any = None, var: Any = None) -> Tensor:
        return F.instance_norm(x, mean, var, w, b, True, momentum, eps)

    if running_mean is None and running_var is None:
        return _by_own_statistics(call, input, weight, bias, run)
    if not call.is_batched(input) or call.is_batched(running_mean) or input.shape[0] != 1:
        return NotImplemented
    # The batch's images write to the running statistics once, as in an ordinary call.
    return _by_own_statistics(
        call, input, weight, bias, lambda x, w, b: run(x, w, b, running_mean, running_var), plain=run
    )


def layer_norm(
    call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.layer_norm``."""
    return _by_own_statistics(
        call, input, weight, bias, lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps), len(normalized_shape)
    )


def rms_norm(
    call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None,
) -> Any:  # fmt: skip
    """Rule for ``torch.nn.functional.rms_norm``."""
    return _by_own_statistics(
        call, input, weight, None, lambda x, w, _: F.rms_norm(x, normalized_shape, w, eps), len(normalized_shape)
    )


def _by_own_statistics(
    call: Call, input: Tensor, weight: Any, bias: Any, run: Callable[..., Tensor], trailing: int = 0,
    plain: Callable[..., Tensor] | None = None,
) -> Any:  # fmt: skip
    """Apply ``run(input, weight, bias)``, which normalises each image over channels or its ``trailing`` dimensions.

    ``plain`` does the same and writes to nothing.
    """
    if not call.serves(weight, bias) or call.owns(input):
        return NotImplemented

    def whole(x: Tensor) -> Tensor:
        return run(x, weight, bias)

    def formula(images: int) -> Normalisation:
        return Normalisation(lambda x: (plain or run)(x, None, None), trailing, images)

    if trailing:
        return call.apply(whole, input, [weight, bias], formula(1))
    return call.apply_to_images(whole, input, [weight, bias], formula)
