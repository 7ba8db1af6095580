"""Data sets from a folder that the user names: ``.npz`` files first, torchvision's own layout second.

``bench/detection/README.md`` says what the files hold.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Bytes = NDArray[np.uint8]

#: File names tried for every set, in order, and torchvision's loader of some.
SETS: Mapping[str, tuple[str, ...]] = {
    "cifar10": ("cifar10", "cifar10-jpeg"), "cifar100": ("cifar100", "cifar100-32"),
    "tinyimagenet": ("tinyimagenet", "tinyimagenet-32"), "svhn": ("svhn", "svhn-gray-32"),
    "textures": ("textures", "textures-32"), "letters": ("notmnist", "notmnist-28"), "scenes": ("scenes", "scenes-28"),
    "photographs": ("imagenet-sample-256",), "large textures": ("textures-256",),
}  # fmt: skip
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}


@dataclass(frozen=True)
class Split:
    """Images ``(n, H, W, C)`` in bytes, their labels if there are any, and whether they went through JPEG."""

    name: str
    images: Bytes
    labels: NDArray[np.int64] | None
    compressed: bool

    def at(self, places: slice | NDArray[np.int64]) -> Split:
        """Return the images at some places."""
        return replace(self, images=self.images[places], labels=None if self.labels is None else self.labels[places])

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Return the images as `to_tensor` gives them, and their labels; a set without labels is a ValueError."""
        if self.labels is None:
            raise ValueError(f"the set {self.name!r} must have labels for this table; its file has none")
        return to_tensor(self.images), torch.from_numpy(self.labels)


def to_tensor(images: Bytes) -> Tensor:
    """Return bytes ``(n, H, W, C)`` as floats ``(n, C, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def to_bytes(images: Tensor) -> Bytes:
    """Invert :func:`to_tensor`, with rounding."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def jpeg(images: Bytes, quality: int = 75, subsampling: str = "4:2:0") -> Bytes:
    """Pass every colour image through JPEG once, by default with half the chroma in each direction."""
    result = np.empty_like(images)
    for i, image in enumerate(images):
        Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=quality, subsampling=subsampling)
        result[i] = np.asarray(Image.open(buffer))
    return result


def compress(images: Tensor) -> Tensor:
    return to_tensor(jpeg(to_bytes(images)))


def _from_npz(path: Path, name: str, part: str, limit: int | None, start: int) -> Split | None:
    """Return a part of a file, or None if the file has no such part."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        labels = archive[f"{part}_labels"].astype(np.int64) if f"{part}_labels" in archive else None
        compressed = f"{part}_jpeg" in archive
        if compressed:
            files, ends = archive[f"{part}_jpeg"].tobytes(), archive[f"{part}_offsets"]
            window = _window(len(ends) - 1, start, limit)
            pairs = itertools.pairwise(ends[window.start : window.stop + 1])
            images = np.stack([np.asarray(Image.open(io.BytesIO(files[first:last]))) for first, last in pairs])
        elif f"{part}_images" in archive:
            images = archive[f"{part}_images"]
            images = images[window := _window(len(images), start, limit)]
        elif "images" in archive:
            images, labels = archive["images"], None
            # Sets without parts are often sorted by class: a fixed shuffle makes any prefix a fair sample.
            images = images[np.random.default_rng(0).permutation(len(images))[_window(len(images), start, limit)]]
        else:
            return None
        images = images if images.ndim == 4 else images[..., None]
        return Split(name, images, None if labels is None else labels[window], compressed)


def _from_torchvision(root: Path, name: str, part: str, limit: int | None, start: int) -> Split | None:
    from torchvision import datasets

    where: dict[str, Any] = {"split": part} if name == "svhn" else {"train": part == "train"}
    try:
        loaded = getattr(datasets, TORCHVISION[name])(root=str(root), download=False, **where)
    except RuntimeError:
        return None
    images, labels = loaded.data, loaded.labels if name == "svhn" else loaded.targets
    images = images.transpose(0, 2, 3, 1) if name == "svhn" else images
    return Split(name, images, np.asarray(labels, np.int64), False).at(_window(len(images), start, limit))


def held_out(total: int, wanted: int) -> int:
    """Return how many images at the end of a set are kept from training: ``wanted``, but at most a tenth."""
    return min(wanted, total // 10)


def _window(total: int, start: int, limit: int | None) -> slice:
    """Return ``limit`` places from ``start``; a negative ``start`` counts from the end."""
    first = total - held_out(total, -start) if start < 0 else start
    return slice(first, total if limit is None else min(total, first + limit))


def load(root: Path, name: str, part: str = "test", limit: int | None = None, start: int = 0) -> Split:
    """Return ``limit`` images of a set in `SETS`, from its ``part``, ``"train"`` or ``"test"``.

    ``start`` is the first one's place; a negative one counts from the end (see `held_out`). Errors name the set or file
    that is unknown, damaged or not in ``root``.
    """
    if name not in SETS:
        raise ValueError(f"name must be one of {', '.join(SETS)}; it was {name!r}")
    for path in filter(Path.exists, (root / f"{file}.npz" for file in SETS[name])):
        try:
            split = _from_npz(path, name, part, limit, start)
        except Exception as error:  # readers raise many kinds where a file was cut off or overwritten
            raise ValueError(f"{path} must be a whole .npz file; it cannot be read ({error})") from error
        if split is not None:
            return split
    if name in TORCHVISION and (split := _from_torchvision(root, name, part, limit, start)):
        return split
    wanted = " or ".join(f"{file}.npz" for file in SETS[name])
    raise FileNotFoundError(f"{root} must hold {wanted} with a {part} part for the set {name!r}")


def stranger(
    root: Path, name: str, like: Split, limit: int, start: int = 0, recompress: Callable[[Bytes], Bytes] = jpeg
) -> Tensor:
    """Return ``limit`` images of another set in the size and with the compression history of ``like``, in colour.

    JPEG's blocks alone would reveal a set that was never compressed, so such a set passes through ``recompress``.
    """
    split = load(root, name, limit=limit, start=start)
    images, size = split.images, like.images.shape[2]
    if images.shape[3] == 1:
        images = np.repeat(images, 3, -1)
    if images.shape[1] != size:
        images = np.stack([Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC) for x in images])
    if like.compressed and not split.compressed:
        images = recompress(images)
    return to_tensor(images)
