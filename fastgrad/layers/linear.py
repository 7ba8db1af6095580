"""Linear layers with any number of positions."""

from __future__ import annotations

from torch import Tensor, nn

from fastgrad.layers.reduce import positions_first, sqnorm, upcast
from fastgrad.layers.registry import LayerRule
from fastgrad.ops.conv.sqnorm import linear_sqnorm
from fastgrad.ops.dispatch import implementation


def weight_sqnorm(a: Tensor, g: Tensor) -> Tensor:
    """Squared norm of each sample's weight gradient ``sum_t g_t a_t^T``, of ``(B, T, C)`` and ``(B, T, O)``."""
    if a.shape[1] == 1:
        a, g = upcast(a, g)
        return sqnorm(a) * sqnorm(g)
    return linear_sqnorm(a, g, impl=implementation.get())


def bias_sqnorm(g: Tensor) -> Tensor:
    """Squared norm of a bias gradient, the sum of ``g`` over positions: ``(B, T, O) -> (B,)``."""
    (g,) = upcast(g)
    return sqnorm(g[:, 0] if g.shape[1] == 1 else g.sum(1))


def linear(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for ``torch.nn.Linear``, and for its transposed form in language models (of the same norm)."""
    a, g = positions_first(a, 1), positions_first(g, 1)
    return {"weight": weight_sqnorm(a, g), "bias": bias_sqnorm(g)}


LINEAR = LayerRule("linear", linear, positions=True, in_place=True)
