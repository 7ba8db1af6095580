"""Squared norms of the gradients of normalisation layers: nearly all that the norms of every parameter say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastgrad.blocks.block import Array, Block, Part, Settings, mixture
from fastgrad.blocks.passes import Pass
from fastgrad.blocks.signals import JOINED, Signal
from fastgrad.blocks.subject import Subject
from fastgrad.blocks.sums import ChannelNorms
from fastgrad.scores.rows import Rows

#: One backward pass of data, and the sums beside it, for each signal.
_BACKWARD = 1.6


class NormalizationNorms(Block):
    """Squared norms over channels of ``sum_t g``, ``sum_t g o`` and ``g`` for three signals, ``(B, 3, 3 L)``.

    The first is the gradient of a normalisation layer's bias, the second that of a scale on its output o, the third
    the gradient of the output itself, at each of the L places of `fastgrad.blocks.channels`.
    """

    name = "normalization_norms"
    alarm = "an unusual pattern of what each layer would have to learn from it"
    reads = ("gradients",)
    ranks = (2, 3)
    shapes = "(B, P) or (B, S, P)"
    squared_norms = True

    def refusal(self, subject: Subject) -> str | None:
        """A network without a layer whose channels could be read."""
        return None if subject.channels else "the network has no normalisation, convolutional or linear layer"

    def price(self, subject: Subject) -> float:
        """Three backward passes."""
        return len(JOINED) * _BACKWARD

    def signals(self, subject: Subject) -> tuple[Signal, ...]:
        """The joined three."""
        return JOINED

    def sites(self, subject: Subject) -> tuple[ChannelNorms, ...]:
        """Every place's norms."""
        return tuple(ChannelNorms.at(place) for place in subject.channels)

    def values(self, found: Pass) -> Tensor:
        """Norms or their logarithms, as the pass is asked for."""
        back = found.back(self.name)
        return back.squared(torch.cat(back.sites, -1))

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        """A mixture on the logarithms."""
        yield mixture(cls.name, blocks, settings)

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> Rows:
        """The logarithms."""
        return Rows.fit(blocks, cls.name, log=settings.log)
