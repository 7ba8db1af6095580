"""The evaluated networks. Pixels come in as [0, 1]; normalisation is part of the network: attacks see it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: A number for each of three channels.
Pixel = tuple[float, float, float]


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation per channel; buffers, not parameters."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Padded(nn.Module):
    """Takes every second position, and adds channels of zeros on both sides: a shortcut without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, 2 C, H / 2, W / 2)``."""
        half = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016), which is convolved or ``padded`` if it widens."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, padded: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if padded and inputs != outputs:
            self.shortcut = Padded()
        elif stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, stride, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, H / stride, W / stride)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Classifier(nn.Module):
    """``normalize``, ``stem``, three or four ``stages``, global average pooling, ``fc`` to ten classes."""

    def __init__(
        self, stem: nn.Module, stages: list[nn.Module], width: int, mean: Pixel = (0.491, 0.482, 0.447),
        std: Pixel = (0.247, 0.243, 0.262),
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalize, self.stem, self.stages = Normalize(mean, std), stem, nn.ModuleList(stages)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.normalize(x))
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.pool(x).flatten(1))


def residual_network(
    width: int = 32, stages: int = 3, blocks: int = 1, stride: int = 2, *, padded: bool = False, **pixels: Pixel
) -> Classifier:
    """Return a residual network; the defaults make the small one of seven convolutions.

    ``width=64, stages=4, blocks=2, stride=1`` is ResNet-18 as it is used on CIFAR-10; ``width=16, stages=3, blocks=3,
    stride=1`` is ResNet-20, with a convolution where a shortcut widens. ``pixels``: the mean and standard deviation.
    """
    stem = nn.Sequential(conv(3, width, stride), nn.BatchNorm2d(width), nn.ReLU())
    parts: list[nn.Module] = []
    inputs = width
    for stage in range(stages):
        outputs = width * 2**stage
        made = [ResidualBlock(inputs, outputs, 2 if stage else 1, padded=padded)]
        made += [ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
        parts.append(made[0] if blocks == 1 else nn.Sequential(*made))
        inputs = outputs
    return Classifier(stem, parts, inputs, **pixels)


class DenseLayer(nn.Module):
    """Narrows by 1x1, convolves by 3x3, and appends the result to its input (Huang et al. 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 4 * growth, kernel=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(out)))], 1)


def transition(inputs: int) -> nn.Module:
    """Return a layer that halves channels, height and width."""
    layers = {"bn1": nn.BatchNorm2d(inputs), "relu": nn.ReLU(), "conv1": conv(inputs, inputs // 2, kernel=1)}
    return nn.Sequential(OrderedDict(layers, pool=nn.AvgPool2d(2)))


def dense_network(growth: int = 12, layers: int = 16) -> Classifier:
    """Return DenseNet-BC of three blocks; the defaults give 100 layers, normalised for the published weights."""
    width = 2 * growth
    parts: list[nn.Module] = []
    for last in (False, False, True):
        block = nn.Sequential(*[DenseLayer(width + i * growth, growth) for i in range(layers)])
        width += layers * growth
        after = [nn.BatchNorm2d(width), nn.ReLU()] if last else [transition(width)]
        parts.append(nn.Sequential(block, *after))
        width = width if last else width // 2
    return Classifier(conv(3, 2 * growth), parts, width, std=(0.2023, 0.1994, 0.2010))
