"""Squared gradient norms of every parameter, for three signals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor

from fastgrad import losses
from fastgrad.blocks.block import Array, Block, Part, Settings
from fastgrad.blocks.extraction import Pass, Signal
from fastgrad.blocks.subject import Subject

#: Losses and targets whose gradients say different things about a sample.
JOINED: tuple[Signal, ...] = tuple(
    partial(losses.delta, target=target, loss=loss)
    for loss, target in (("bce", "ones"), ("cross_entropy", "ones"), ("cross_entropy", "predicted"))
)


class Gradients(Block):
    """``||dL/dtheta||^2`` of all P parameters, ``(B, 3, P)``, for three losses, two more than in the source.

    Lee, Lehman, Prabhushankar and AlRegib, "Probing the Purview of Neural Networks via Gradient Analysis", 2023.
    """

    name = "gradients"
    alarm = "an unusual pattern of what the network would have to learn from it"
    ranks = (2, 3)
    shapes = "(B, P) or (B, S, P)"
    squared_norms = True

    def price(self, subject: Subject) -> float:
        """Return the price of each signal's backward pass and norms: about a training step's backward pass."""
        return 2.5 * len(JOINED)

    def signals(self, subject: Subject) -> tuple[Signal, ...]:
        return JOINED

    def values(self, found: Pass) -> Tensor:
        return found.squared_norms(self.name)

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield cls.mixture(blocks, settings)
