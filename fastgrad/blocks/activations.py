"""How strongly each channel of the normalisation layers responds: mean squares over positions, in the forward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgrad.blocks.block import JOINT, Block
from fastgrad.blocks.channels import Channels, output_of, sampled
from fastgrad.blocks.forward import Pass, Reading
from fastgrad.blocks.subject import Subject
from fastgrad.losses import compute_dtype
from fastgrad.ops.channel_moments import channel_square_sums
from fastgrad.scores.one_class import CLIP, distance


class Activations(Block):
    """``log mean_t o_bct^2`` for every channel c at the places that `fastgrad.blocks.channels` chooses, ``(B, D)``.

    An output ``(B, C)``, without positions, is read as it is, because a square would lose its sign. Large maps are read
    on a coarse grid. The score is the shrunk Mahalanobis distance of the standardised columns.
    """

    name = "activations"
    alarm = "inner activations unlike those of known inputs"
    scores = (distance,)
    classified: ClassVar[Mapping[str, Any]] = {"clip": CLIP, **JOINT}

    def refusal(self, subject: Subject) -> str | None:
        layers = "normalisation, convolution, linear, recurrent or attention layer but the last"
        return None if subject.channels else f"the network calls no {layers} exactly once, with a row for each sample"

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        """Return a reading for each place: its columns, or for maps some positions, squared after the forward pass."""
        return tuple(
            Reading(place.path, functools.partial(_read, place, mask), copied=False) for place in subject.channels
        )

    def values(self, forward: Pass) -> Tensor:
        """Return the columns side by side, in the order of the forward pass."""
        values, places = forward.readings(self.name), forward.subject.channels
        if all(value.dim() > 2 for value in values):  # maps, of which all columns take one logarithm together
            dims = [tuple(range(2, value.dim())) for value in values]
            means = [v.to(compute_dtype(v.dtype)).square().mean(dim) for v, dim in zip(values, dims, strict=True)]
            return _log(torch.cat(means, 1))
        seen = zip(places, values, strict=True)
        return torch.cat([_columns(value, place.dim) if place.grid else value for place, value in seen], 1)


def _columns(value: Tensor, dim: int, mask: Tensor | None = None) -> Tensor:
    """Return each channel's log mean square over its positions, or its only value: ``(B, C)`` in at least float32."""
    if value.dim() == 2:
        # Copied, because an in-place activation may follow.
        return value.to(compute_dtype(value.dtype), copy=True)
    if mask is not None and dim == -1 and value.dim() == 3 and mask.shape == value.shape[:2]:
        # Padding is not part of a text; what a network computes there says nothing about it.
        weights = mask.to(torch.float32).unsqueeze(-1)
        return _log(channel_square_sums(value * weights.to(value.dtype), -1) / weights.sum(1).clamp_min(1))
    return _log(channel_square_sums(value, dim) / max(1, math.prod(value.shape[1:]) // value.shape[dim]))


def _log(means: Tensor) -> Tensor:
    return means.clamp_min(torch.finfo(torch.float32).tiny).log()


def _read(place: Channels, mask: Tensor | None, inputs: tuple[Any, ...], output: Any) -> Tensor:
    value = output_of(output)
    assert value is not None  # or the place would not have been found
    return sampled(value, place.grid) if place.grid else _columns(value.detach(), place.dim, mask)
