"""Squared gradient norms of every parameter, for three signals."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastgrad.batches import copied
from fastgrad.blocks.block import Block
from fastgrad.blocks.forward import Pass
from fastgrad.gradients.features import GradientFeatures
from fastgrad.scores.one_class import mixture


class Gradients(Block):
    """``||dL/dtheta||^2`` of all P parameters, ``(B, 3, P)``, for three losses, two more than in the source.

    Lee, Lehman, Prabhushankar and AlRegib, "Probing the Purview of Neural Networks via Gradient Analysis", 2023.
    """

    name = "gradients"
    alarm = "an unusual pattern of what the network would have to learn from it"
    ranks = (2, 3)
    shapes = "(B, P) or (B, S, P)"
    squared_norms = True
    live = True
    scores = (mixture,)
    #: Losses and targets whose gradients say different things about a sample.
    signals: ClassVar[tuple[tuple[str, str], ...]] = (
        ("bce", "ones"), ("cross_entropy", "ones"), ("cross_entropy", "predicted"),
    )  # fmt: skip
    #: A forward pass of its own, and for each signal a training step's backward pass.
    price = 1 + 2.5 * 3

    def values(self, forward: Pass) -> Tensor:
        if self.name not in forward.kept:
            forward.kept[self.name] = GradientFeatures(
                forward.model, signals=self.signals, log=forward.log, batch_dims=0
            )
        args, kwargs = copied((forward.args, forward.kwargs))
        features: Tensor = forward.kept[self.name](*args, **kwargs)[1]
        return features
