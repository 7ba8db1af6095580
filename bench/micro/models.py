"""The measured networks, in plain torch, so that a machine with nothing else runs them.

Published shapes: ResNet-18/50 (He et al. 2016) with the stem usual for 32x32 images where ``small`` is set,
DenseNet-121 from torchvision, ViT-B/16 (Dosovitskiy et al. 2021), a GPT-like decoder that classifies a sequence by its
last token. Activations are modules and projections are ``nn.Linear``, so that as many peers as possible accept them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with ``bottleneck``."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, norm: type[nn.Module]) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        shapes = (
            [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
            if bottleneck
            else [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        )
        layers: list[nn.Module] = []
        for a, b, kernel, step in shapes:
            layers += [
                nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False),
                normalisation(norm, b),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), normalisation(norm, outputs)
            )
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` in and out."""
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


def normalisation(kind: type[nn.Module], channels: int) -> nn.Module:
    """Batch norm, or group norm with 32 channels or fewer a group."""
    return nn.GroupNorm(max(1, channels // 32), channels) if kind is nn.GroupNorm else kind(channels)


def resnet(
    depth: int = 18,
    classes: int = 10,
    *,
    small: bool = True,
    norm: type[nn.Module] = nn.BatchNorm2d,
    width: int = 64,
) -> nn.Module:
    """ResNet-18 or -50 in evaluation mode."""
    counts, bottleneck = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}[depth]
    stem = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small else nn.Conv2d(3, width, 7, 2, 3, bias=False)
    layers: list[nn.Module] = [stem, normalisation(norm, width), nn.ReLU()]
    if not small:
        layers.append(nn.MaxPool2d(3, 2, 1))
    channels = width
    for stage, count in enumerate(counts):
        for i in range(count):
            inner = width << stage
            layers.append(Block(channels, inner, 2 if i == 0 and stage else 1, bottleneck, norm))
            channels = 4 * inner if bottleneck else inner
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers).eval()


def plain(classes: int = 10, width: int = 32) -> nn.Module:
    """Six convolutions and a linear layer, no norm: what every peer accepts."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in range(3):
        for i in range(2):
            outputs = width << stage
            layers += [nn.Conv2d(channels, outputs, 3, 2 if i == 1 else 1, 1), nn.ReLU()]
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)).eval()


def densenet(classes: int = 10) -> nn.Module:
    """DenseNet-121 of torchvision, its activations not in place (two peers save what they would overwrite)."""
    from torchvision.models import densenet121

    model: nn.Module = densenet121(num_classes=classes).eval()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` in and out."""
        B, T, W = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(B, T, W))
        return out


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` in and out."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Vision transformer with a class token; ViT-B/16 with the defaults."""

    def __init__(
        self, classes: int = 1000, image: int = 224, patch: int = 16, width: int = 768, depth: int = 12,
        heads: int = 12,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.layers = nn.Sequential(*(Layer(width, heads, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, classes)``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        out: Tensor = self.head(self.norm(self.layers(x)[:, 0].contiguous()))
        return out


class GPT(nn.Module):
    """Decoder over tokens, a class per sequence from the last position."""

    def __init__(
        self, classes: int = 10, vocabulary: int = 8192, length: int = 128, width: int = 256, depth: int = 4,
        heads: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads, True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T)`` token indices to ``(B, classes)``."""
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        x = self.tokens(x) + self.positions(places)
        out: Tensor = self.head(self.norm(self.layers(x)[:, -1].contiguous()))
        return out


def images(batch: int, size: int) -> Callable[[torch.Generator], Tensor]:
    """What makes ``(batch, 3, size, size)``."""
    return lambda made: torch.randn(batch, 3, size, size, generator=made)


def tokens(batch: int, length: int, vocabulary: int) -> Callable[[torch.Generator], Tensor]:
    """What makes ``(batch, length)`` of integers below ``vocabulary``."""
    return lambda made: torch.randint(vocabulary, (batch, length), generator=made)
