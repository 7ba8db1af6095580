"""Mean squares of channels: how strongly each channel of each normalisation layer responds, from the forward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrad.blocks.block import CLIP, Array, Block, Part, Settings
from fastgrad.blocks.channels import Channels, output_of, sampled
from fastgrad.blocks.extraction import Pass
from fastgrad.blocks.subject import Subject
from fastgrad.engine.run import Reading
from fastgrad.ops.channel_moments import channel_square_sums
from fastgrad.scores.rows import Rows

#: Principal components that the challenge classifier reads.
COMPONENTS = 64


class Activations(Block):
    """``log mean_t o_bct^2`` of every channel c of places that `fastgrad.blocks.channels` names, ``(B, D)``.

    Its score is the shrunk Mahalanobis distance of the standardised columns. Large maps are read on a coarse grid.
    """

    name = "activations"
    alarm = "inner activations unlike those of known inputs"
    shapes = "(B, D)"

    def refusal(self, subject: Subject) -> str | None:
        return None if subject.channels else "the network has no normalisation, convolutional or linear layer"

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        """The mean squares of every place; of large maps a sample of positions, squared after the forward pass."""
        return tuple(
            Reading(place.path, functools.partial(_read, place, mask), copied=False) for place in subject.channels
        )

    def values(self, found: Pass) -> Tensor:
        """The logarithms side by side, in the order of the forward pass."""
        seen = zip(found.subject.channels, found.readings(self.name), strict=True)
        columns = [_mean_square(value, place.dim) if place.grid else value for place, value in seen]
        return torch.cat(columns, 1).clamp_min(torch.finfo(torch.float32).tiny).log()

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield cls.distance(blocks, settings)

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> Rows:
        return cls.rows(blocks, settings, clip=CLIP, dimensions=COMPONENTS)


def _mean_square(value: Tensor, dim: int) -> Tensor:
    """Each channel's mean square over positions ``(B, C)``, float32."""
    return channel_square_sums(value, dim) / max(1, math.prod(value.shape[1:]) // value.shape[dim])


def _read(place: Channels, mask: Tensor | None, inputs: tuple[Any, ...], output: Any) -> Tensor:
    value = output_of(output)
    assert value is not None  # the place was found by it
    if place.grid:
        return sampled(value, place.grid)
    if mask is None or place.dim != -1 or value.dim() != 3 or mask.shape != value.shape[:2]:
        return _mean_square(value, place.dim)
    # Padding is no part of a text; what a network computes there says nothing about it.
    weights = mask.to(torch.float32).unsqueeze(-1)
    return channel_square_sums(value * weights.to(value.dtype), -1) / weights.sum(1).clamp_min(1)
