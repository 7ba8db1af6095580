"""Local contrast: how the differences between neighbours are distributed over an image, or over the first maps.

Every natural image has smooth regions, whose low local contrast shows noise and compression. The high contrast at edges
shows blur and overlays (noise estimation as in Immerkaer, "Fast noise variance estimation", 1996). `Image` reads the
pixels, for any network, and `Roughness` the network's first maps, as the network itself sees the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.blocks.block import Block
from fastgrad.blocks.channels import output_of
from fastgrad.blocks.forward import Pass, Reading
from fastgrad.blocks.subject import NO_IMAGE, Subject, is_image
from fastgrad.losses import compute_dtype
from fastgrad.scores.one_class import mixture

#: Largest number of pixels read: more say no more about a distribution.
_PIXELS = 1024
#: Largest numbers of positions per channel and of channels that are read of maps. 1,024 positions gained .005 on
#: photographs with EfficientNet-Lite0 and lost .010 with Lite1, both within the intervals.
_POSITIONS, _CHANNELS = 256, 16
#: Contrast below this share of a channel's mean contrast is rounding, which the root would otherwise magnify.
_FLOOR = 1e-3
#: A channel's mean contrast below so many roundings of its largest value counts as 0: a filter that training left at 0
#: puts out a constant, whose rounding depends on the order of sums and would be standardised like any contrast.
_ROUNDING = 64
#: Values of which the largest is taken, and how often this is done in turn: extremes of 4, 16 and 64 values.
_EACH, _TIMES = 4, 3


class Image(Block):
    """`image_statistics` of the input, ``(B, 28)``: noise, blur, compression and lighting change them."""

    name = "image"
    alarm = "brightness, sharpness or noise unlike those of known images"
    scores = (mixture,)

    def refusal(self, subject: Subject) -> str | None:
        return None if subject.image is not None else NO_IMAGE

    def values(self, forward: Pass) -> Tensor:
        return image_statistics(forward.image())


def image_statistics(images: Tensor) -> Tensor:
    """Return how local contrast and intensity are distributed over each image, ``(B, 28)`` in at least float32.

    The columns are seven statistics, each of four values per pixel: three differences from neighbours, as root mean
    squares over channels, and the intensity. The differences enter as square roots, which are nearly normal over images
    and have no singularity in flat regions, as logarithms do. Their unit is the root of the input's; every fourth
    column, the intensity, has the input's. ValueError unless ``images`` are floating, ``(B, C, H, W)``, with H and W at
    least 3.
    """
    if not is_image(images):
        kind = f"{tuple(images.shape)}, {images.dtype}"
        raise ValueError(f"images must be floating, (B, C, H, W) with H and W at least 3; it was {kind}")
    centre, neighbours = differences(images.detach().to(compute_dtype(images.dtype)), _PIXELS)
    contrasts = torch.stack(neighbours, 1).square().mean(2)
    intensity = centre.mean(1, keepdim=True)
    return mean_extremes(torch.cat([contrasts.sqrt().sqrt(), intensity], 1).flatten(2))


class Roughness(Block):
    """Local contrast of up to 16 channels of the first normalised, or convolved, maps, ``(B, D)``.

    It describes how the roots of each channel's differences between neighbours are distributed over positions, after
    adding a thousandth of their mean to each.
    """

    name = "roughness"
    alarm = "fine grain, as the first layer sees it, unlike that of known inputs"
    scores = (mixture,)

    def refusal(self, subject: Subject) -> str | None:
        maps = "no convolution or normalisation that is called once puts out maps (B, C, H, W), at least 3 x 3"
        return None if subject.first is not None else maps

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        return () if subject.first is None else (Reading(subject.first, _of_output, copied=False),)

    def values(self, forward: Pass) -> Tensor:
        return forward.readings(self.name)[0]


def roughness(maps: Tensor) -> Tensor:
    """Return how the local contrast of each channel is distributed, ``(B, 3 * c * 7)`` in at least float32.

    Its unit is the root of the input's. Of ``maps`` ``(B, C, H, W)``, H and W at least 3, c channels are read, at most
    16 and evenly spaced.
    """
    x = maps[:, :: -(-maps.shape[1] // _CHANNELS)]
    centre, neighbours = differences(x.to(compute_dtype(x.dtype)), _POSITIONS)
    sizes = torch.cat(neighbours, 1).flatten(2).abs_()
    mean = sizes.mean(-1, keepdim=True)
    least = _ROUNDING * torch.finfo(sizes.dtype).eps * centre.abs().amax((2, 3)).repeat(1, 3).unsqueeze(-1)
    return mean_extremes(torch.where(mean < least, 0.0, sizes + _FLOOR * mean).sqrt_())


def _of_output(inputs: tuple[Any, ...], output: Any) -> Tensor:
    value = output_of(output)
    assert value is not None  # or the place would not have been found
    return roughness(value.detach())


def differences(x: Tensor, most: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return inner positions of ``x`` ``(B, C, H, W)`` and their differences from neighbours, ``(B, C, n, m)`` each.

    The differences are the mixed one (vertical, then horizontal), the vertical and the horizontal one: exactly zero
    where neighbours are equal. H and W are at least 3, and n m at most ``most``, on a regular grid.
    """
    rows, columns = x.shape[2] - 2, x.shape[3] - 2
    step = 1
    while -(-rows // step) * -(-columns // step) > most:
        step += 1

    def shifted(down: int, right: int) -> Tensor:
        # One slice, because an exported file would copy the result of each of two.
        return x[:, :, 1 + down : 1 + down + rows : step, 1 + right : 1 + right + columns : step]

    centre, below, beside = shifted(0, 0), shifted(1, 0), shifted(0, 1)
    vertical = centre - below
    return centre, (vertical - (beside - shifted(1, 1)), vertical, centre - beside)


def mean_extremes(values: Tensor) -> Tensor:
    """Describe how the n values of each row are distributed, ``(B, K, n)`` to ``(B, 7 K)``.

    K columns each: the mean, and over groups of 4, 16 and 64 values the mean maximum and minus the mean minimum.
    Quantiles need a sort, which would be half of the price of the default blocks. Values i, i + n // 4 and so on form
    a group, and groups likewise; values left over when all groups are full count only in the mean.
    """
    groups = _grouped(values)
    both = torch.cat([groups.amax(-2), -groups.amin(-2)], 1)
    columns = [values.mean(-1), both.mean(-1)]
    for _ in range(_TIMES - 1):
        both = _grouped(both).amax(-2)
        columns.append(both.mean(-1))
    return torch.cat(columns, 1)


def _grouped(values: Tensor) -> Tensor:
    """Return ``(B, K, n)`` as ``(B, K, 4, n // 4)``."""
    each = min(_EACH, values.shape[-1])
    groups = values.shape[-1] // each
    grouped: Tensor = values[..., : each * groups].unflatten(-1, (each, groups))
    return grouped
