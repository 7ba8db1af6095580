"""Linear layers with any number of positions, and embedding tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrad.layers.reduce import positions_first, sqnorm, upcast
from fastgrad.layers.registry import LayerRule
from fastgrad.ops.conv.sqnorm import linear_sqnorm
from fastgrad.ops.dispatch import implementation


def weight_sqnorm(a: Tensor, g: Tensor) -> Tensor:
    """Return squared norms ``(B,)`` of weight gradients ``sum_t g_t a_t^T`` from ``(B, T, C)`` and ``(B, T, O)``."""
    if a.shape[1] == 1:
        a, g = upcast(a, g)
        return sqnorm(a) * sqnorm(g)
    return linear_sqnorm(a, g, impl=implementation.get())


def bias_sqnorm(g: Tensor) -> Tensor:
    """Return squared norms of bias gradients, the sum of ``g`` over positions: ``(B, T, O) -> (B,)``."""
    (g,) = upcast(g)
    return sqnorm(g[:, 0] if g.shape[1] == 1 else g.sum(1))


def linear(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for ``torch.nn.Linear``, and for its transposed form in language models, whose norm is the same."""
    a, g = positions_first(a, 1), positions_first(g, 1)
    return {"weight": weight_sqnorm(a, g), "bias": bias_sqnorm(g)}


def embedding(module: nn.Module, index: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for ``torch.nn.Embedding``: positions with the same index add up before the norm is taken.

    Position t adds ``||s_t||^2 / c_t``, where ``s_t`` sums ``g`` over the c_t positions with its index. Unlike a sum
    over pairs of positions, this has no negative terms, so nothing cancels.
    """
    assert isinstance(module, nn.Embedding)
    (g,) = upcast(g)
    g = positions_first(g, 1)
    index = index.reshape(g.shape[0], g.shape[1])
    if module.padding_idx is not None:
        g = g * (index != module.padding_idx).unsqueeze(-1)
    if g.shape[1] == 1:
        return {"weight": sqnorm(g[:, 0])}
    same = (index.unsqueeze(1) == index.unsqueeze(2)).to(g.dtype)
    return {"weight": (torch.bmm(same, g).square().sum(2) / same.sum(2)).sum(1)}


LINEAR = LayerRule("linear", linear, positions=True, in_place=True)
EMBEDDING = LayerRule("embedding", embedding, positions=True, in_place=True)
