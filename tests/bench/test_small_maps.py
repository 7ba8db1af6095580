"""The convolution that training takes on small maps is a convolution, and is gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.detection.small_maps import products


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 12, 13])
def test_values_and_gradients_are_those_of_a_convolution(size: int, stride: int) -> None:
    torch.manual_seed(size)
    layer = nn.Conv2d(5, 7, 3, stride, 1, bias=False).double()
    x = torch.randn(3, 5, size, size, dtype=torch.float64, requires_grad=True)
    expected = layer(x)
    signal = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, layer.weight], signal)
    with products(layer):
        found = layer(x)
        gradients = torch.autograd.grad(found, [x, layer.weight], signal)
    # Sums of at most 45 products, and of 3 * 169 for the weight, in another order.
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, (2, 1), 1, bias=False),
    ],
)  # fmt: skip
def test_other_convolutions_stay_as_they_are(layer: nn.Module) -> None:
    with products(layer):
        assert type(layer) is nn.Conv2d


def test_it_takes_the_type_of_autocast() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    with products(layer), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.rand(2, 4, 4, 4)).dtype == torch.bfloat16


def test_layers_are_themselves_again_after_an_exception() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    with pytest.raises(RuntimeError), products(layer):
        layer(torch.rand(2, 3, 4, 4))
    assert type(layer) is nn.Conv2d
