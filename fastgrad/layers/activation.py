"""Activations with parameters."""

from __future__ import annotations

from torch import Tensor, nn

from fastgrad.layers.reduce import sqnorm, upcast
from fastgrad.layers.registry import LayerRule


def prelu(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for PReLU: the slope's gradient is the sum of ``g * a`` where ``a`` is negative."""
    assert isinstance(module, nn.PReLU)
    a, g = upcast(a, g)
    product = g * a.clamp(max=0)
    if module.num_parameters == 1:
        return {"weight": product.reshape(product.shape[0], -1).sum(1).square()}
    return {"weight": sqnorm(product.flatten(2).sum(2) if product.dim() > 2 else product)}


PRELU = LayerRule("PReLU", prelu, in_place=True)
