"""Attention in a private copy multiplies as it does in the user's model: one product, not one a position."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from small_nets import Net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrad.blocks import Logits
from fastgrad.blocks.extraction import Extraction


class Products(TorchDispatchMode):
    """Counts matrix products by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def encoder(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.first(x)
    mixed, _ = net.attention(x, x, x, need_weights=False)
    return net.head(net.second(x + mixed).mean(1))


@pytest.mark.parametrize("frozen", [False, True])
def test_no_product_a_position(frozen: bool) -> None:
    torch.manual_seed(0)
    model = Net(
        encoder,
        first=nn.LayerNorm(8),
        second=nn.LayerNorm(8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, 3),
    )
    model.eval().requires_grad_(not frozen)
    extraction, x = Extraction(model, [Logits()]), torch.randn(4, 7, 8)
    extraction(x)
    with Products() as products:
        extraction(x)
    assert products.seen["bmm"] == 0
    assert products.seen["addmm"] >= 2
    assert all(p.requires_grad is not frozen for p in model.parameters())
