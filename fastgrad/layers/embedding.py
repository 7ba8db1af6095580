"""Embedding tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrad.layers.reduce import positions_first, sqnorm, upcast
from fastgrad.layers.registry import LayerRule


def embedding(module: nn.Module, index: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rule for ``torch.nn.Embedding``: positions with the same index add up before the norm is taken.

    The sum over pairs of positions with one index, ``sum_{i_t = i_t'} g_t . g_t'``, is a masked Gram matrix;
    its last reduction runs in float64 because its terms have both signs.
    """
    assert isinstance(module, nn.Embedding)
    (g,) = upcast(g)
    g = positions_first(g, 1)
    index = index.reshape(g.shape[0], g.shape[1])
    if module.padding_idx is not None:
        g = g * (index != module.padding_idx).unsqueeze(-1)
    if g.shape[1] == 1:
        return {"weight": sqnorm(g[:, 0])}
    same = index.unsqueeze(1) == index.unsqueeze(2)
    gram = torch.bmm(g, g.transpose(1, 2)) * same
    return {"weight": gram.sum((1, 2), dtype=torch.float64).to(g.dtype)}


EMBEDDING = LayerRule("embedding", embedding, positions=True, in_place=True)
