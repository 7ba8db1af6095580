"""What the demo is shown: handwritten digits and pieces of photographs, both from scikit-learn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastgrad.checks import extra

#: Height and width of the images.
SIDE = 24


class LabelledImages(NamedTuple):
    """Grey images ``(n, 1, 24, 24)``, float32 in [0, 1], and their classes ``(n,)``, int64."""

    images: Tensor
    labels: Tensor

    def part(self, start: int, stop: int | None = None) -> LabelledImages:
        """Some of the images."""
        return LabelledImages(self.images[start:stop], self.labels[start:stop])


def digits(generator: torch.Generator) -> LabelledImages:
    """The 1,797 digits of 8 x 8 pixels, enlarged, in a random order (E. Alpaydin, C. Kaynak, UCI, 1998)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator)
    pixels = torch.from_numpy(data.images.astype(np.float32) / 16)[order, None]
    images = interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return LabelledImages(images, torch.from_numpy(data.target.astype(np.int64))[order])


def photographs(count: int) -> Tensor:
    """Pieces of scikit-learn's two photographs in random order, grey, ``(count, 1, 24, 24)`` in [0, 1]."""
    with extra("demo"):
        from sklearn.datasets import load_sample_images

        pictures = load_sample_images().images
    grey = torch.from_numpy(np.stack(pictures).astype(np.float32) / 255).mean(-1)
    pieces = grey.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).reshape(-1, 1, SIDE, SIDE)
    return pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:count]]
