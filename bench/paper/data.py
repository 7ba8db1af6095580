"""Data sets from a folder that the user names: ``.npz`` files first, torchvision's own layout second.

``<name>.npz`` holds ``uint8`` images ``(n, H, W)`` or ``(n, H, W, 3)`` as ``train_images``, ``train_labels``,
``test_images``, ``test_labels``, or only ``images`` for a set used for testing alone. A compressed set
holds JPEG files back to back instead: image i is ``test_jpeg[test_offsets[i]:test_offsets[i + 1]]``, likewise
``train_``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Bytes = NDArray[np.uint8]

#: File names tried for every set, in order, and the loader of torchvision that knows the set.
SETS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "cifar10": (("cifar10", "cifar10-jpeg"), "CIFAR10"),
    "cifar100": (("cifar100", "cifar100-32"), "CIFAR100"),
    "tinyimagenet": (("tinyimagenet", "tinyimagenet-32"), None),
    "svhn": (("svhn", "svhn-gray-32"), "SVHN"),
    "textures": (("textures", "textures-32"), None),
    "mnist": (("mnist",), "MNIST"),
    "fashion": (("fashion-mnist",), "FashionMNIST"),
    "kuzushiji": (("kmnist", "kmnist-28"), "KMNIST"),
    "letters": (("notmnist", "notmnist-28"), None),
    "omniglot": (("omniglot", "omniglot-28"), None),
    "scenes": (("scenes", "scenes-28"), None),
}


@dataclass(frozen=True)
class Split:
    """Images ``(n, H, W, C)`` in bytes, their labels if there are any, and whether they went through JPEG."""

    images: Bytes
    labels: NDArray[np.int64] | None
    compressed: bool

    def tensor(self, count: int | None = None) -> Tensor:
        """The first ``count`` images as floats ``(n, C, H, W)`` in [0, 1]."""
        return to_tensor(self.images[:count])


def to_tensor(images: Bytes) -> Tensor:
    """Bytes ``(n, H, W, C)`` to floats ``(n, C, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def to_bytes(images: Tensor) -> Bytes:
    """The inverse of :func:`to_tensor`, rounded."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def jpeg(images: Bytes, quality: int = 75) -> Bytes:
    """Every colour image once through JPEG with Pillow's default 4:2:0 chroma."""
    result = np.empty_like(images)
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze()).save(buffer, "JPEG", quality=quality)
        result[i] = np.asarray(Image.open(buffer)).reshape(image.shape)
    return result


def _from_npz(path: Path, part: str, limit: int | None, start: int) -> Split | None:
    with np.load(path, allow_pickle=False) as archive:
        labels_key = f"{part}_labels" if f"{part}_labels" in archive else "labels"
        labels = None
        if labels_key in archive:
            labels = archive[labels_key].astype(np.int64)
            labels = labels[_window(len(labels), start, limit)]
        if f"{part}_jpeg" in archive:
            files, offsets = archive[f"{part}_jpeg"].tobytes(), archive[f"{part}_offsets"]
            chosen = range(len(offsets) - 1)[_window(len(offsets) - 1, start, limit)]
            images = np.stack(
                [np.asarray(Image.open(io.BytesIO(files[offsets[i] : offsets[i + 1]]))) for i in chosen]
            )
            return Split(images, labels, True)
        key = f"{part}_images" if f"{part}_images" in archive else "images"
        if key not in archive:
            return None
        images = archive[key]
        if key == "images":
            # Sets without parts are often sorted by class: a fixed shuffle makes any prefix a fair sample.
            images = images[np.random.default_rng(0).permutation(len(images))]
            labels = None
        images = images[_window(len(images), start, limit)]
        return Split(images if images.ndim == 4 else images[..., None], labels, False)


def _from_torchvision(root: Path, loader: str, part: str, limit: int | None, start: int) -> Split | None:
    from torchvision import datasets

    where: dict[str, Any] = {"split": part} if loader == "SVHN" else {"train": part == "train"}
    try:
        loaded = getattr(datasets, loader)(root=str(root), download=False, **where)
    except RuntimeError:
        return None
    images = np.asarray(loaded.data)
    if loader == "SVHN":
        images = images.transpose(0, 2, 3, 1)
    labels = np.asarray(loaded.labels if loader == "SVHN" else loaded.targets, dtype=np.int64)
    images = images if images.ndim == 4 else images[..., None]
    window = _window(len(images), start, limit)
    return Split(images[window], labels[window], False)


def held_out(total: int, wanted: int) -> int:
    """How many images at the end of a set are kept from training: ``wanted``, but at most a tenth."""
    return min(wanted, total // 10)


def _window(total: int, start: int, limit: int | None) -> slice:
    """``limit`` places from ``start``, which counts from the end where it is negative."""
    first = total - held_out(total, -start) if start < 0 else start
    return slice(first, total if limit is None else min(total, first + limit))


def load(root: Path, name: str, part: str = "test", limit: int | None = None, start: int = 0) -> Split:
    """``limit`` images of a set in :data:`SETS`, from its ``part`` (``"train"`` or ``"test"``).

    ``start`` is the first one's place; a negative one counts from the end (see `held_out`).

    Raises:
        ValueError: unknown name.
        FileNotFoundError: neither a ``.npz`` file nor torchvision's files are in ``root``.
    """
    if name not in SETS:
        raise ValueError(f"name must be one of {', '.join(SETS)}; it was {name!r}")
    files, loader = SETS[name]
    for file in files:
        path = root / f"{file}.npz"
        if path.exists() and (split := _from_npz(path, part, limit, start)) is not None:
            return split
    if loader is not None and (split := _from_torchvision(root, loader, part, limit, start)) is not None:
        return split
    raise FileNotFoundError(f"{root} must hold {' or '.join(f'{f}.npz' for f in files)} for the set {name!r}")


def grey(images: Bytes) -> Bytes:
    """The luma of colour images on all three channels."""
    luma = images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat(luma.round().clip(0, 255).astype(np.uint8)[..., None], 3, -1)


def stranger(root: Path, name: str, like: Split, limit: int) -> Tensor:
    """``limit`` images of another set in the shape and with the compression history of ``like``.

    The blocks of JPEG alone tell a set that was never compressed from one that was; so where ``like`` is
    compressed, the other set passes through the same quality.
    """
    images = load(root, name, limit=limit).images
    size, channels = like.images.shape[1], like.images.shape[3]
    if images.shape[3] == 1 and channels == 3:
        images = np.repeat(images, 3, -1)
    if images.shape[3] == 3 and channels == 1:
        images = grey(images)[..., :1]
    if images.shape[1] != size:
        images = np.stack([_resize(image, size) for image in images])
    if like.compressed and channels == 3:
        images = jpeg(images)
    return to_tensor(images)


def _resize(image: Bytes, size: int) -> Bytes:
    resized = Image.fromarray(image.squeeze()).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized).reshape(size, size, image.shape[2])
