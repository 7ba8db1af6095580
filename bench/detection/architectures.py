"""The evaluated networks. Pixels come in as [0, 1]; normalisation is part of the network: attacks see it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation per channel; buffers, not parameters."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        return (x - self.mean) / self.std


def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, stride, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, H / stride, W / stride)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class DenseLayer(nn.Module):
    """BN, ReLU, 3x3 convolution; the result is appended to the input channels (Huang et al. 2017).

    With ``bottleneck`` a 1x1 convolution to four times the growth comes first.
    """

    def __init__(self, inputs: int, growth: int, bottleneck: bool = False) -> None:
        super().__init__()
        self.narrow: nn.Module = nn.Identity()
        if bottleneck:
            self.narrow = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, 4 * growth, 1, 1))
            inputs = 4 * growth
        self.bn, self.conv = nn.BatchNorm2d(inputs), conv(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C + growth, H, W)``."""
        return torch.cat([x, self.conv(F.relu(self.bn(self.narrow(x))))], 1)


class Classifier(nn.Module):
    """``normalize``, ``stem``, three ``stages``, global average pooling, ``fc``.

    The stages are kept apart so that the feature-ensemble baselines can read one feature vector after each.
    """

    def __init__(
        self, stem: nn.Module, stages: list[nn.Module], width: int, classes: int, channels: int
    ) -> None:
        super().__init__()
        grey, colour = ([0.5], [0.3]), ([0.491, 0.482, 0.447], [0.247, 0.243, 0.262])
        self.normalize = Normalize(*(colour if channels == 3 else grey))
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def stage_features(self, x: Tensor) -> list[Tensor]:
        """Spatial means after the stem and after every stage: ``(B, C_i)`` each."""
        x = self.stem(self.normalize(x))
        found = [x.mean((2, 3))]
        for stage in self.stages:
            x = stage(x)
            found.append(x.mean((2, 3)))
        return found

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features h ``(B, D)``."""
        x = self.stem(self.normalize(x))
        for stage in self.stages:
            x = stage(x)
        return self.pool(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, N)``."""
        return self.fc(self.features(x))


def residual_network(
    channels: int = 3,
    classes: int = 10,
    *,
    width: int = 32,
    stages: int = 3,
    blocks: int = 1,
    stride: int = 2,
) -> Classifier:
    """A residual network of ``stages`` with ``blocks`` each; the defaults make the small one of seven convolutions.

    ``width=64, stages=4, blocks=2, stride=1`` is ResNet-18 as it is used on CIFAR-10.
    """
    stem = nn.Sequential(conv(channels, width, stride), nn.BatchNorm2d(width), nn.ReLU())
    parts: list[nn.Module] = []
    inputs = width
    for stage in range(stages):
        outputs = width * 2**stage
        made = [ResidualBlock(inputs, outputs, 2 if stage else 1)]
        made += [ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
        parts.append(made[0] if blocks == 1 else nn.Sequential(*made))
        inputs = outputs
    return Classifier(stem, parts, inputs, classes, channels)


def dense_network(
    channels: int = 3,
    classes: int = 10,
    *,
    growth: int = 12,
    layers: int = 4,
    bottleneck: bool = False,
    stride: int = 2,
) -> Classifier:
    """A densely connected network of three blocks of ``layers``; between them the image and the width halve.

    ``layers=16, bottleneck=True, stride=1`` is DenseNet-BC of depth 100 and growth 12.
    """
    width = 2 * growth
    stem = conv(channels, width, stride)
    stages: list[nn.Module] = []
    for block in range(3):
        parts: list[nn.Module] = []
        if block:
            parts += [nn.BatchNorm2d(width), nn.ReLU(), conv(width, width // 2, 1, 1), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(layers):
            parts.append(DenseLayer(width, growth, bottleneck))
            width += growth
        if block == 2:
            parts += [nn.BatchNorm2d(width), nn.ReLU()]
        stages.append(nn.Sequential(*parts))
    return Classifier(stem, stages, width, classes, channels)


def read(model: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Features h and logits."""
    with torch.no_grad():
        h = torch.cat([model.features(part) for part in torch.split(images, 500)])
        return {"features": h.numpy(), "logits": model.fc(h).numpy()}


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of smallest negative log-likelihood, on a grid of factors of 1.05."""
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    grid = [1.05**power for power in range(-30, 50)]
    return min(grid, key=lambda t: float(F.cross_entropy(z / t, y)))
