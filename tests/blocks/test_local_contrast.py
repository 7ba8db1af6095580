"""Image statistics and roughness against position-by-position NumPy computations in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_nets import Net
from torch import Tensor, nn

from fastgrad.blocks import Roughness
from fastgrad.blocks.extraction import Extraction
from fastgrad.blocks.local_contrast import image_statistics, mean_extremes, roughness
from fastgrad.blocks.subject import is_image, watch

EPS = torch.finfo(torch.float32).eps


def extremes(rows: list[list[float]]) -> np.ndarray:
    """The definition: of every value, of every fourth, ... the mean, largest and smallest; columns before rows."""
    columns = [[np.mean(row) for row in rows]]
    high, low = [list(row) for row in rows], [list(row) for row in rows]
    for _ in range(3):
        groups = max(1, len(high[0]) // 4)
        each = min(4, len(high[0]))
        high = [[max(row[i + k * groups] for k in range(each)) for i in range(groups)] for row in high]
        low = [[min(row[i + k * groups] for k in range(each)) for i in range(groups)] for row in low]
        columns.append([np.mean(row) for row in high] + [-np.mean(row) for row in low])
    return np.concatenate(columns)


def contrasts(image: np.ndarray) -> list[np.ndarray]:
    """Diagonal, vertical and horizontal differences of ``(C, H, W)``, each ``(n, C)``."""
    _, height, width = image.shape
    found: list[list[np.ndarray]] = [[], [], []]
    for i in range(1, height - 1):
        for j in range(1, width - 1):
            c, below, beside = image[:, i, j], image[:, i + 1, j], image[:, i, j + 1]
            found[0].append(c - below - beside + image[:, i + 1, j + 1])
            found[1].append(c - below)
            found[2].append(c - beside)
    return [np.array(values) for values in found]


def reference_image(image: np.ndarray) -> np.ndarray:
    inner = image[:, 1:-1, 1:-1].mean(0).ravel()
    return extremes([*[list((d**2).mean(1) ** 0.25) for d in contrasts(image)], list(inner)])


def reference_maps(maps: np.ndarray) -> np.ndarray:
    sizes = [abs(d[:, c]) for d in contrasts(maps) for c in range(len(maps))]
    return extremes([list((size + 1e-3 * size.mean()) ** 0.5) for size in sizes])


@pytest.mark.parametrize("count", [1, 3, 4, 7, 64, 100])
def test_extremes_are_those_of_groups_and_order_a_distribution(count: int) -> None:
    values = torch.randn(2, 3, count, dtype=torch.float64)
    found = mean_extremes(values)
    expected = np.stack([extremes([list(row) for row in one]) for one in values.numpy()])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)
    mean, *rest = found.view(2, 7, 3).unbind(1)
    largest, smallest = rest[0::2], rest[1::2]
    assert bool((largest[0] >= mean - 1e-9).all()) or count % 4
    for k in (1, 2):
        assert bool((largest[k] >= largest[k - 1] - 1e-9).all()) or count % 64
        assert bool((smallest[k] >= smallest[k - 1] - 1e-9).all()) or count % 64


@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 3, 3), (4, 12, 12)])
@pytest.mark.parametrize(("function", "reference"), [(image_statistics, reference_image), (roughness, reference_maps)])
def test_equal_to_the_definition(shape: tuple[int, int, int], function: object, reference: object) -> None:
    x = torch.rand(5, *shape, dtype=torch.float64)
    expected = np.stack([reference(one) for one in x.numpy()])  # type: ignore[operator]
    # A difference of numbers below 1 has an absolute error of some eps, of which a root makes its square root at zero.
    np.testing.assert_allclose(function(x).numpy(), expected, rtol=1e-10, atol=1e-7)  # type: ignore[operator]
    single = function(x.float())  # type: ignore[operator]
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=20 * EPS, atol=(20 * EPS) ** 0.5)
    half = x.half()
    assert torch.equal(function(half), function(half.float()))  # type: ignore[operator]


def test_large_maps_are_sampled() -> None:
    x = torch.rand(2, 3, 400, 300)
    # Every 12th position of 398 x 298.
    torch.testing.assert_close(image_statistics(x)[:, 3], x[:, :, 1:-1:12, 1:-1:12].mean((1, 2, 3)))
    assert image_statistics(x).shape == (2, 4 * 7)
    maps = torch.randn(2, 90, 70, 50)
    assert roughness(maps).shape == (2, 3 * 15 * 7)
    assert torch.equal(roughness(maps), roughness(maps[:, ::6].contiguous()))


def test_constant_channel_has_no_contrast() -> None:
    maps = torch.randn(3, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    maps[:, 1] = -3.7
    noisy = maps.clone()
    noisy[:, 1] *= 1 + 1e-6 * torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(noisy, maps)
    assert torch.equal(roughness(noisy), roughness(maps))


@pytest.mark.parametrize("function", [image_statistics, roughness])
def test_no_neighbour_matters_and_flat_inputs_are_zero(function: object) -> None:
    x = torch.rand(6, 3, 16, 16)
    assert torch.equal(function(x), torch.cat([function(part) for part in x.split(1)]))  # type: ignore[operator]
    flat = function(torch.full((2, 3, 8, 8), 0.3))  # type: ignore[operator]
    contrast = flat.view(2, 7, -1)[:, :, :3]
    assert not contrast.any()
    assert function(x[:0]).shape == (0, flat.shape[1])  # type: ignore[operator]
    assert function(torch.full((1, 1, 4, 4), torch.nan)).isnan().all()  # type: ignore[operator]
    layout = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(function(layout), function(x), rtol=99 * EPS, atol=0)  # type: ignore[operator]


def test_noise_and_blur_move_extremes() -> None:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.linspace(0, 1, 32).expand(4, 3, 32, 32).clone()
    smooth[:, :, :, 16:] += 0.5

    def of(images: Tensor) -> Tensor:
        return image_statistics(images).view(4, 7, 4)

    clean = of(smooth)
    noisy = of(smooth + 0.03 * torch.randn(smooth.shape, generator=generator))
    assert (noisy[:, 2, 0] < 3 * clean[:, 2, 0] - 0.01).all()
    blurred = of(torch.nn.functional.avg_pool2d(smooth, 5, 1, 2, count_include_pad=False))
    assert (blurred[:, 5, 2] < clean[:, 5, 2]).all()


@pytest.mark.parametrize(
    "value", [torch.rand(2, 3, 2, 8), torch.rand(2, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "image"]
)
def test_what_is_no_image_is_refused(value: object) -> None:
    assert not is_image(value)
    if isinstance(value, Tensor):
        with pytest.raises(ValueError, match=r"images must be floating, \(B, C, H, W\)"):
            image_statistics(value)


def classifier(*layers: nn.Module, width: int) -> Net:
    """Layers, a mean over what is left of positions, and a head."""
    head = nn.Linear(width, 5)
    return Net(lambda net, x: net.head(net.layers(x).flatten(2).mean(2)), layers=nn.Sequential(*layers), head=head)


def test_normalised_maps_come_before_others() -> None:
    torch.manual_seed(0)
    net = classifier(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 6, 3), width=6).eval()
    x = torch.randn(7, 3, 9, 8)
    assert watch(net, (x,), {}).first == "layers.1"
    logits, values = Extraction(net, [Roughness()])(x)
    expected = roughness(net.layers[1](net.layers[0](x)).detach())
    torch.testing.assert_close(values["roughness"], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits, net(x).detach())
    plain = classifier(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), width=6).eval()
    assert watch(plain, (x,), {}).first == "layers.0"


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (classifier(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), width=4), (2, 3, 20)),
        (classifier(nn.Conv2d(3, 4, 3, stride=4), width=4), (2, 3, 8, 8)),
    ],
    ids=["signals", "maps without neighbours"],
)
def test_networks_without_maps_are_refused(net: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'roughness': no convolution .* puts out maps"):
        Extraction(net.eval(), [Roughness()])(torch.randn(shape))
