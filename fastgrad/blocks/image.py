"""Local statistics of the input image, whatever the network: what noise, blur, compression and lighting change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastgrad.blocks.block import Array, Block, Part, Settings
from fastgrad.blocks.extraction import Pass
from fastgrad.blocks.local_contrast import differences, mean_extremes
from fastgrad.blocks.subject import Subject, is_image
from fastgrad.losses import compute_dtype

#: More pixels than these say no more about a distribution.
_PIXELS = 1024


class Image(Block):
    """`image_statistics` of the input, ``(B, 28)``."""

    name = "image"
    alarm = "brightness, sharpness or noise unlike those of known images"
    shapes = "(B, K)"

    def refusal(self, subject: Subject) -> str | None:
        return subject.lacks_image()

    def values(self, found: Pass) -> Tensor:
        return image_statistics(found.image())

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield cls.mixture(blocks, settings)


def image_statistics(images: Tensor) -> Tensor:
    """How local contrast and intensity are distributed over the pixels of each image, ``(B, 28)`` in at least float32.

    Seven statistics in turn of four values of each pixel: the differences from its neighbours
    (`fastgrad.blocks.local_contrast`), root mean squares over channels, and the intensity. The contrasts are taken as
    square roots of amplitudes: near a normal distribution over images and free of the singularity that a logarithm has
    in flat regions. Their unit is the root of the input's; every fourth column, intensity, has the input's. ValueError
    for what is not floating, ``(B, C, H, W)``, with H and W at least 3.
    """
    if not is_image(images):
        kind = f"{tuple(images.shape)}, {images.dtype}"
        raise ValueError(f"images must be floating, (B, C, H, W) with H and W at least 3; it was {kind}")
    centre, neighbours = differences(images.detach().to(compute_dtype(images.dtype)), _PIXELS)
    contrasts = torch.stack(neighbours, 1).square().mean(2)
    intensity = centre.mean(1, keepdim=True)
    return mean_extremes(torch.cat([contrasts.sqrt().sqrt(), intensity], 1).flatten(2))
