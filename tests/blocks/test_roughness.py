"""Roughness against a position-by-position NumPy computation in float64, and which networks have it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastgrad.blocks import Roughness
from fastgrad.blocks.extraction import Extraction
from fastgrad.blocks.local_contrast import QUANTILES
from fastgrad.blocks.roughness import roughness
from fastgrad.blocks.subject import watch

EPS = torch.finfo(torch.float32).eps


def reference(channel: np.ndarray) -> np.ndarray:
    """The definition for one channel ``(H, W)`` in float64, a row for each measure."""
    height, width = channel.shape
    laplacian, diagonal, first = [], [], []
    for i in range(1, height - 1):
        for j in range(1, width - 1):
            c, below, beside = channel[i, j], channel[i + 1, j], channel[i, j + 1]
            laplacian.append((4 * c - below - beside - channel[i - 1, j] - channel[i, j - 1]) ** 2)
            diagonal.append((c - below - beside + channel[i + 1, j + 1]) ** 2)
            first.append((c - below) ** 2 + (c - beside) ** 2)
    return np.array([[np.mean(v), *np.quantile(v, QUANTILES)] for v in (laplacian, diagonal, first)]) ** 0.25


@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 3, 3), (5, 12, 12)])
def test_equal_to_the_definition(shape: tuple[int, int, int]) -> None:
    maps = torch.randn(4, *shape, dtype=torch.float64)
    expected = np.stack(
        [np.stack([reference(channel) for channel in one], 1).ravel() for one in maps.numpy()]
    )
    # A difference of numbers of size 4 has an absolute error of some eps, of which a fourth root of its square makes
    # a square root at zero.
    np.testing.assert_allclose(roughness(maps).numpy(), expected, rtol=1e-10, atol=1e-7)
    single = roughness(maps.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=20 * EPS, atol=(20 * EPS) ** 0.5)


def test_half_precision_is_computed_in_float32() -> None:
    maps = torch.randn(2, 3, 8, 8, dtype=torch.float16)
    torch.testing.assert_close(roughness(maps), roughness(maps.float()), rtol=0, atol=0)


def test_large_maps_are_read_on_a_grid_and_of_many_channels_some() -> None:
    maps = torch.randn(2, 90, 70, 50)
    assert roughness(maps).shape == (2, 3 * 30 * 8)
    # Every third channel; one row of an image changes nothing in the other.
    torch.testing.assert_close(roughness(maps), roughness(maps[:, ::3].contiguous()), rtol=0, atol=0)
    torch.testing.assert_close(roughness(maps)[:1], roughness(maps[:1]), rtol=0, atol=0)
    whole = np.stack([reference(channel) for channel in maps[0, :1].double().numpy()], 1).ravel()
    # 240 of 3,300 positions: ranks of quantiles have standard errors below sqrt(.25 / 240) = .03.
    # 1 % and 99 %, of which a grid has two or three positions, are left out.
    inner = np.r_[0, 2:7]
    found = roughness(maps[:1, :1].contiguous())[0].numpy().reshape(3, 8)[:, inner]
    assert np.abs(found - whole.reshape(3, 8)[:, inner]).max() < 0.25


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"]
)
def test_layouts_agree(layout: torch.memory_format) -> None:
    maps = torch.randn(3, 6, 11, 13)
    # Means of 99 squares, summed in another order.
    found = roughness(maps.contiguous(memory_format=layout))
    torch.testing.assert_close(found, roughness(maps), rtol=99 * EPS, atol=0)


class Classifier(nn.Module):
    """Layers, a mean over what is left of positions, and a head."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(2).mean(2))


def test_normalised_maps_come_before_others() -> None:
    torch.manual_seed(0)
    net = Classifier(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 6, 3), width=6).eval()
    x = torch.randn(7, 3, 9, 8)
    assert watch(net, (x,), {}).first == "layers.1"
    logits, values = Extraction(net, [Roughness()])(x)
    expected = roughness(net.layers[1](net.layers[0](x)).detach())
    torch.testing.assert_close(values["roughness"], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits, net(x).detach())
    plain = Classifier(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), width=6).eval()
    assert watch(plain, (x,), {}).first == "layers.0"


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Classifier(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), width=4), (2, 3, 20)),
        (Classifier(nn.Conv2d(3, 4, 3, stride=4), width=4), (2, 3, 8, 8)),
    ],
    ids=["signals", "maps without neighbours"],
)
def test_networks_without_maps_are_refused(net: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="'roughness': the network's first layers put out no maps"):
        Extraction(net.eval(), [Roughness()])(torch.randn(shape))
