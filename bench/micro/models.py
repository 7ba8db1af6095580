"""The measured networks, in plain torch, so that a machine with nothing else runs them.

Published shapes: ResNet-18/50 (He et al. 2016) with the stem usual for 32x32 images where ``small`` is set,
DenseNet-121 from torchvision, ViT-B/16 (Dosovitskiy et al. 2021), a GPT-like decoder that classifies a sequence by its
last token. Activations are modules and projections are ``nn.Linear``, so that as many peers as possible accept them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = Callable[[int, torch.Generator], Tensor]
Network = tuple[Callable[[], nn.Module], Inputs]


def convolved(inputs: int, outputs: int, kernel: int, stride: int, norm: type[nn.Module]) -> list[nn.Module]:
    """Return a convolution, its normalisation (group norm of 32 channels or fewer a group) and its rectifier."""
    normalised = nn.GroupNorm(max(1, outputs // 32), outputs) if norm is nn.GroupNorm else norm(outputs)
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), normalised, nn.ReLU()]


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with ``bottleneck``."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, norm: type[nn.Module]) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        layers = [layer for shape in shapes for layer in convolved(*shape, norm)]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*convolved(inputs, outputs, 1, stride, norm)[:-1])
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` in and out."""
        return self.relu(self.body(x) + self.shortcut(x))


def resnet(
    depth: int = 18, classes: int = 10, *, small: bool = True, norm: type[nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    counts, bottleneck = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}[depth]
    layers = convolved(3, 64, 3, 1, norm) if small else [*convolved(3, 64, 7, 2, norm), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(counts):
        width = 64 << stage
        for i in range(count):
            layers.append(Block(channels, width, 2 if i == 0 and stage else 1, bottleneck, norm))
            channels = 4 * width if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def plain(classes: int = 10, width: int = 32, norm: bool = False) -> nn.Module:
    """Six convolutions and a linear layer, without norm what every peer accepts.

    The second of each pair halves the image; with batch norm the first of the second and of the third pair.
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


def densenet(classes: int = 10) -> nn.Module:
    """DenseNet-121 of torchvision, its activations not in place (two peers save what they would overwrite)."""
    from torchvision.models import densenet121

    model: nn.Module = densenet121(num_classes=classes)
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
        return self.out(mixed.transpose(1, 2).reshape(B, T, W))


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
        return x + self.mlp(self.norm2(x))


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
        return self.head(self.norm(self.layers(x)[:, 0].contiguous()))


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
        return self.head(self.norm(self.layers(x)[:, -1].contiguous()))


def images(size: int) -> Inputs:
    """Return what makes ``(batch, 3, size, size)``."""
    return lambda batch, made: torch.randn(batch, 3, size, size, generator=made)


def tokens(length: int, vocabulary: int) -> Inputs:
    """Return what makes ``(batch, length)`` of integers below ``vocabulary``."""
    return lambda batch, made: torch.randint(vocabulary, (batch, length), generator=made)


#: Each network, and its inputs given a batch.
NETWORKS: dict[str, Network] = {
    "plain CNN 8x8": (partial(plain, width=4), images(8)),
    "plain CNN 8x8, 3 classes": (partial(plain, classes=3, width=4), images(8)),
    "plain CNN 32x32": (plain, images(32)),
    "ResNet-18 32x32": (resnet, images(32)),
    "ResNet-18 group norm 32x32": (partial(resnet, norm=nn.GroupNorm), images(32)),
    "ResNet-50 64x64": (partial(resnet, 50, 100, small=False), images(64)),
    "ResNet-50 224x224": (partial(resnet, 50, 1000, small=False), images(224)),
    "DenseNet-121 64x64": (densenet, images(64)),
    "ViT-B/16 64x64": (partial(ViT, 100, 64), images(64)),
    "ViT-B/16 224x224": (ViT, images(224)),
    "GPT T=6": (partial(GPT, vocabulary=16, length=6, width=8, depth=1, heads=2), tokens(6, 16)),
    "GPT T=128": (GPT, tokens(128, 8192)),
}
