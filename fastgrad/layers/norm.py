"""Normalisation layers: the weight's gradient is the sum over positions of ``g * xhat``, the bias's that of ``g``.

The slope of PReLU has such a gradient, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad._torch import NormBase, is_batched
from fastgrad.layers.reduce import positions_first, sqnorm, upcast
from fastgrad.layers.registry import LayerRule


def _channel_sqnorm(x: Tensor) -> Tensor:
    """Return squared norms ``(B,)`` of ``(B, C, *)`` summed over positions."""
    return sqnorm(x.flatten(2).sum(2) if x.dim() > 2 else x)


def _channel_norms(xhat: Tensor, g: Tensor) -> dict[str, Tensor]:
    return {"weight": _channel_sqnorm(g * xhat), "bias": _channel_sqnorm(g)}


def prelu(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for PReLU: the slope's gradient is the sum of ``g * a`` where ``a`` is negative."""
    assert isinstance(module, nn.PReLU)
    a, g = upcast(a, g)
    product = g * a.clamp(max=0)
    if module.num_parameters == 1:
        return {"weight": product.reshape(product.shape[0], -1).sum(1).square()}
    return {"weight": _channel_sqnorm(product)}


def batch_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for batch norm with running statistics."""
    assert isinstance(module, NormBase)
    a, g = upcast(a, g)
    mean, var = (x.to(a.dtype) for x in (module.running_mean, module.running_var) if x is not None)
    if a.dim() == 2 or is_batched(g) or not a.is_contiguous():
        return _channel_norms(F.batch_norm(a, mean, var, eps=module.eps), g)
    samples, channels = a.shape[:2]
    # With samples folded into channels, the reduction over (batch, positions) becomes one per sample. One pass over the
    # two tensors then gives both sums.
    g, a = (x.reshape(1, samples * channels, -1) for x in (g, a))
    mean, var = (x.expand(samples, -1).reshape(-1) for x in (mean, var))
    _, weight, bias = torch.ops.aten.native_batch_norm_backward(
        g, a, None, mean, var, None, None, False, module.eps, [False, True, True]
    )
    return {"weight": sqnorm(weight.view(samples, channels)), "bias": sqnorm(bias.view(samples, channels))}


def instance_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for instance norm, with the statistics of the instance or running ones."""
    assert isinstance(module, NormBase)
    a, g = upcast(a, g)
    if module.running_mean is not None and not module.training:
        return batch_norm(module, a, g)
    return _channel_norms(F.instance_norm(a, eps=module.eps), g)


def group_norm(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for group norm."""
    assert isinstance(module, nn.GroupNorm)
    a, g = upcast(a, g)
    return _channel_norms(F.group_norm(a, module.num_groups, eps=module.eps), g)


def over_last(normalized: Callable[..., Tensor], module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for layer norm and RMS norm over the last dimensions, and for the RMS norms of language models."""
    a, g = upcast(a, g)
    shape: Any = getattr(module, "normalized_shape", a.shape[-1:])
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    product = g * normalized(a, list(shape), eps=eps)
    g, product = positions_first(g, len(shape)), positions_first(product, len(shape))
    return {"weight": sqnorm(product.sum(1)), "bias": sqnorm(g.sum(1))}


def layer_norm_2d(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for layer norms over C of ``(B, C, H, W)``, which image libraries define."""
    return over_last(F.layer_norm, module, a.movedim(1, -1), g.movedim(1, -1))


PRELU = LayerRule("PReLU", prelu, in_place=True)
BATCH_NORM = LayerRule("batch norm (evaluation)", batch_norm, in_place=True)
INSTANCE_NORM = LayerRule("instance norm", instance_norm, in_place=True)
GROUP_NORM = LayerRule("group norm", group_norm, in_place=True)
LAYER_NORM = LayerRule("layer norm", functools.partial(over_last, F.layer_norm), positions=True, in_place=True)
LAYER_NORM_2D = LayerRule("layer norm over channels", layer_norm_2d)
RMS_NORM = LayerRule("RMS norm", functools.partial(over_last, F.rms_norm), positions=True, in_place=True)
RMS_NORM_OF_TRANSFORMERS = replace(RMS_NORM, in_place=False)
