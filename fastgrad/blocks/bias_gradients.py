"""Signed gradients of the biases of normalisation layers: one backward pass of data, no norm, no weight gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrad.blocks.activations import CLIP, COMPONENTS, wide_mahalanobis
from fastgrad.blocks.block import Array, Block, Part, Settings
from fastgrad.blocks.channels import Channels
from fastgrad.blocks.passes import Pass
from fastgrad.blocks.signals import PREDICTED_LOGIT, Signal
from fastgrad.blocks.subject import Subject
from fastgrad.blocks.sums import ChannelSums
from fastgrad.scores.rows import Rows

#: A backward pass of data does a forward pass's products, and reads what that one wrote.
_BACKWARD = 1.3


class BiasGradients(Block):
    """``sum_t g_bct`` of the predicted logit at every place of `fastgrad.blocks.channels`, ``(B, D)``.

    It is the gradient of a normalisation layer's bias, or of the bias that a layer would have, given as
    ``sign(v) sqrt(|v|)``. Channels keep their signs and their places: norms give both away.

    Args:
        depth: Share of the network, counted in operations from its end, that the backward pass goes through.
    """

    name = "bias_gradients"
    alarm = "an answer that rests on unusual parts of the network"
    reads = ("gradients",)
    shapes = "(B, D)"

    def __init__(self, depth: float = 1.0) -> None:
        if not 0 < depth <= 1:
            raise ValueError(f"depth must lie in (0, 1]; it was {depth!r}")
        self.depth = depth

    def options(self) -> dict[str, Any]:
        """The depth."""
        return {"depth": self.depth}

    def places(self, subject: Subject) -> tuple[Channels, ...]:
        """Where channels are read, from the given depth on; the last place in any case."""
        deep = tuple(place for place in subject.channels if place.depth >= 1 - self.depth)
        return deep or subject.channels[-1:]

    def refusal(self, subject: Subject) -> str | None:
        """A network without a layer whose channels could be read."""
        return None if subject.channels else "the network has no normalisation, convolutional or linear layer"

    def price(self, subject: Subject) -> float:
        """The backward pass as far as its first place."""
        return _BACKWARD * (1 - min((place.depth for place in self.places(subject)), default=0.0))

    def signals(self, subject: Subject) -> tuple[Signal, ...]:
        """The predicted logit."""
        return (PREDICTED_LOGIT,)

    def sites(self, subject: Subject) -> tuple[ChannelSums, ...]:
        """The places' sums."""
        return tuple(ChannelSums.at(place) for place in self.places(subject))

    def values(self, found: Pass) -> Tensor:
        """Signed roots side by side, in the order of the forward pass."""
        sums = torch.cat([part[0] for part in found.back(self.name).sites], -1)
        return sums.sign() * sums.abs().sqrt()

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        """One distance."""
        yield wide_mahalanobis(cls.name, blocks)

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> Rows:
        """The leading principal components."""
        return Rows.fit(blocks, cls.name, clip=CLIP, dimensions=COMPONENTS)
