"""How rough the network's first maps are: local contrast as the network itself sees it, from the forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrad.blocks.block import Array, Block, Part, Settings
from fastgrad.blocks.channels import output_of
from fastgrad.blocks.forward import Pass, Reading
from fastgrad.blocks.local_contrast import differences, mean_extremes
from fastgrad.blocks.subject import Subject
from fastgrad.losses import compute_dtype

# Largest numbers of positions per channel and of channels that are read. 1,024 positions gained .005 on photographs
# with EfficientNet-Lite0 and lost .010 with Lite1, both within the intervals.
_POSITIONS, _CHANNELS = 256, 16
# Contrast below this share of a channel's mean contrast is rounding, which the root would otherwise magnify.
_FLOOR = 1e-3
# A channel's mean contrast below so many roundings of its largest value counts as 0: a filter that training left at 0
# puts out a constant, whose rounding depends on the order of sums and would be standardised like any contrast.
_ROUNDING = 64


class Roughness(Block):
    """Local contrast of up to 16 channels of the first normalised, or convolved, maps, ``(B, D)``.

    It describes how the roots of each channel's differences between neighbours are distributed over positions, after
    adding a thousandth of their mean to each. `fastgrad.blocks.image` reads pixels alike, before the first filters.
    """

    name = "roughness"
    alarm = "fine grain, as the first layer sees it, unlike that of known inputs"
    shapes = "(B, D)"

    def refusal(self, subject: Subject) -> str | None:
        maps = "no convolution or normalisation that is called once puts out maps (B, C, H, W), at least 3 x 3"
        return None if subject.first is not None else maps

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        return () if subject.first is None else (Reading(subject.first, _of_output, copied=False),)

    def values(self, found: Pass) -> Tensor:
        return found.readings(self.name)[0]

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield cls.mixture(blocks, settings)


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
