"""The measured networks, in plain PyTorch, so that they need no other package.

Published shapes: ResNet-18/50 (He et al. 2016), DenseNet-121 from torchvision, ViT-B/16 (Dosovitskiy et al. 2021), a
GPT-like decoder that classifies a sequence by its last token. Activations are modules and projections are
``nn.Linear``, so that as many peers as possible accept them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = Callable[[int, torch.Generator], Tensor]
Norm = Callable[[int], nn.Module]
Network = tuple[Callable[[], nn.Module], Inputs]


def convolved(inputs: int, outputs: int, kernel: int, stride: int, norm: Norm) -> list[nn.Module]:
    """Return a convolution, its normalisation and its rectifier."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), norm(outputs), nn.ReLU()]


class Block(nn.Module):
    """Residual block of convolutions, each of inputs, outputs, kernel and stride."""

    def __init__(self, shapes: list[tuple[int, int, int, int]], norm: Norm) -> None:
        super().__init__()
        layers = [layer for shape in shapes for layer in convolved(*shape, norm)]
        self.body, self.relu, self.shortcut = nn.Sequential(*layers[:-1]), layers[-1], nn.Sequential()
        inputs, outputs, stride = shapes[0][0], shapes[-1][1], max(shape[3] for shape in shapes)
        if stride != 1 or inputs != outputs:
            self.shortcut.extend(convolved(inputs, outputs, 1, stride, norm)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def resnet(classes: int = 10, deep: bool = False, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """Return ResNet-18 with the stem usual for 32x32 images or, if ``deep``, ResNet-50."""
    layers = [*convolved(3, 64, 7, 2, norm), nn.MaxPool2d(3, 2, 1)] if deep else convolved(3, 64, 3, 1, norm)
    inputs = 64
    for stage, count in enumerate((3, 4, 6, 3) if deep else (2, 2, 2, 2)):
        width = 64 << stage
        for i in range(count):
            stride = 2 if i == 0 and stage else 1
            shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
            if deep:
                shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
            layers.append(Block(shapes, norm))
            inputs = shapes[-1][1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def plain(classes: int = 10, width: int = 32, norm: bool = False) -> nn.Module:
    """Return six convolutions and a linear layer; every peer accepts them without batch norm.

    The second of each pair halves the image; with batch norm, the first of the second and of the third pair does.
    """
    layers: list[nn.Module] = []
    channels = 3
    for stage in range(3):
        for stride in (1, 2) if not norm else (2 if stage else 1, 1):
            inputs, channels = channels, width << stage
            if norm:
                layers += convolved(inputs, channels, 3, stride, nn.BatchNorm2d)
            else:
                layers += [nn.Conv2d(inputs, channels, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def zoo(name: str, **options: Any) -> nn.Module:
    """Return torchvision's network of ten classes, without dropout and with activations that are not in place."""
    from torchvision.models import get_model

    model: nn.Module = get_model(name, num_classes=10, **options)
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.Hardswish, nn.Hardsigmoid)):
            module.inplace = False
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Layer(nn.Module):
    """Pre-norm transformer layer, with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` in and out."""
        B, T, W = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, W))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer with a class token, ViT-B/16."""

    def __init__(self, classes: int = 1000, image: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 768))
        self.position = nn.Parameter(torch.randn(1, (image // 16) ** 2 + 1, 768) * 0.02)
        self.layers = nn.Sequential(*(Layer(768, 12, False) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, classes)``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layers(x)[:, 0].contiguous()))


class GPT(nn.Module):
    """Decoder over tokens, one of ten classes per sequence from the last position."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads, True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T)`` token indices to ``(B, classes)``."""
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        x = self.tokens(x) + self.positions(places)
        return self.head(self.norm(self.layers(x)[:, -1].contiguous()))


def images(size: int) -> Inputs:
    """Return a function that makes inputs ``(batch, 3, size, size)``."""
    return lambda batch, made: torch.randn(batch, 3, size, size, generator=made)


def tokens(length: int, vocabulary: int) -> Inputs:
    """Return a function that makes inputs ``(batch, length)``, integers below ``vocabulary``."""
    return lambda batch, made: torch.randint(vocabulary, (batch, length), generator=made)


#: Each network, and what makes a batch of its inputs.
NETWORKS: dict[str, Network] = {
    "plain CNN 8x8": (partial(plain, width=4), images(8)),
    "plain CNN 8x8, 3 classes": (partial(plain, classes=3, width=4), images(8)),
    "plain CNN 32x32": (plain, images(32)),
    "ResNet-18 32x32": (resnet, images(32)),
    "ResNet-18 group norm 32x32": (partial(resnet, norm=lambda c: nn.GroupNorm(c // 32, c)), images(32)),
    "ResNet-50 64x64": (partial(resnet, 100, deep=True), images(64)),
    "ResNet-50 224x224": (partial(resnet, 1000, deep=True), images(224)),
    "DenseNet-121 64x64": (partial(zoo, "densenet121"), images(64)),
    "ViT-B/16 64x64": (partial(ViT, 100, 64), images(64)),
    "ViT-B/16 224x224": (ViT, images(224)),
    "GPT T=6": (partial(GPT, 16, 6, 8, 1, 2), tokens(6, 16)),
    "GPT T=128": (partial(GPT, 8192, 128, 256, 4, 4), tokens(128, 8192)),
}
