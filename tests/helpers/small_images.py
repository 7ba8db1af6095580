"""Small images, loaders of them, and a small network of four classes that answers them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.challenges import PixelRange, challenge_names, generate_challenges

CLASSES = 4
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def small_network(seed: int = 0, channels: int = 3, scale: float = 20.0) -> nn.Sequential:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, CLASSES),
    )  # fmt: skip
    with torch.no_grad():
        network.get_parameter("6.weight").mul_(scale)
    return network


def small_net(channels: int = 3, scale: float = 1.0) -> nn.Sequential:
    """The same, less certain of its answers."""
    return small_network(0, channels, scale)


def images(count: int, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")


def loader(count: int = 200, seed: int = 0, labels: bool = True) -> list[Any]:
    return [(x, torch.arange(len(x)) % CLASSES) if labels else x for x in images(count, seed).split(50)]


def photos(batch: int = 6, channels: int = 3, size: int = 16, seed: int = 3) -> Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def normalised(unit: Tensor) -> Tensor:
    return (unit - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def challenged(
    model: nn.Module | None, images: Tensor, names: list[str] | None = None, *, seed: int = 0, **seen: Any
) -> dict[str, Tensor]:
    """Every image altered in each of these ways, by their full names; ``seen`` says which range images have."""
    pixels = PixelRange.of(images, **seen)
    made = {}
    for name in challenge_names(names):
        made[name] = images.clamp(pixels.low, pixels.high)
        for batch in generate_challenges(model, images, names=[name], each=1, seed=seed, pixels=pixels):
            made[name][batch.sources] = batch.inputs
    return made
