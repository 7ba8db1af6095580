"""The images that ship with the package: digits of MNIST, clothes of Fashion-MNIST (see ``data/LICENSES.md``)."""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class LabelledImages(NamedTuple):
    """Grey images ``(n, 1, 28, 28)``, float32 in [0, 1], and their classes ``(n,)``, int64."""

    images: Tensor
    labels: Tensor


def load(name: str, part: str) -> LabelledImages:
    """Load a shipped set.

    Args:
        name: ``"digits"`` or ``"fashion"``.
        part: ``"train"`` (6,000 digits) or ``"test"`` (1,500 digits, 1,000 clothes).

    Raises:
        ValueError: There is no such set or part.
    """
    if (name, part) not in {("digits", "train"), ("digits", "test"), ("fashion", "test")}:
        raise ValueError(
            f"name, part must be a shipped set such as 'digits', 'train'; it was {name!r}, {part!r}"
        )
    path = resources.files("fastgrad") / "data" / f"{name}.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    pixels = torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1)
    return LabelledImages(pixels, torch.from_numpy(labels.astype(np.int64)))
