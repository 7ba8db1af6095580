"""Local statistics of the input image, for any network: noise, blur, compression and lighting change them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastgrad.blocks.block import Array, Block, Part, Settings
from fastgrad.blocks.forward import Pass
from fastgrad.blocks.local_contrast import differences, mean_extremes
from fastgrad.blocks.subject import NO_IMAGE, Subject, is_image
from fastgrad.losses import compute_dtype

#: Largest number of pixels read: more say no more about a distribution.
_PIXELS = 1024


class Image(Block):
    """`image_statistics` of the input, ``(B, 28)``."""

    name = "image"
    alarm = "brightness, sharpness or noise unlike those of known images"
    shapes = "(B, K)"

    def refusal(self, subject: Subject) -> str | None:
        return None if subject.image is not None else NO_IMAGE

    def values(self, found: Pass) -> Tensor:
        return image_statistics(found.image())

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield cls.mixture(blocks, settings)


def image_statistics(images: Tensor) -> Tensor:
    """Return how local contrast and intensity are distributed over each image, ``(B, 28)`` in at least float32.

    The columns are seven statistics, each of four values per pixel: three differences from neighbours
    (`fastgrad.blocks.local_contrast`), as root mean squares over channels, and the intensity. The differences enter as
    square roots, which are nearly normal over images and have no singularity in flat regions, as logarithms do. Their
    unit is the root of the input's; every fourth column, the intensity, has the input's. ValueError unless ``images``
    are floating, ``(B, C, H, W)``, with H and W at least 3.
    """
    if not is_image(images):
        kind = f"{tuple(images.shape)}, {images.dtype}"
        raise ValueError(f"images must be floating, (B, C, H, W) with H and W at least 3; it was {kind}")
    centre, neighbours = differences(images.detach().to(compute_dtype(images.dtype)), _PIXELS)
    contrasts = torch.stack(neighbours, 1).square().mean(2)
    intensity = centre.mean(1, keepdim=True)
    return mean_extremes(torch.cat([contrasts.sqrt().sqrt(), intensity], 1).flatten(2))
