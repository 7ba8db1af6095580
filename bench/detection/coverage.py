"""NAC (Liu et al., 2024): how seldom clean images had a network's neurons in the states that an image has them in.

A state is a sigmoid of what a channel's mean adds to the divergence between the uniform and the predicted distribution;
its range is cut into equal bins, and a bin that clean images have filled counts as covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Place(NamedTuple):
    """How the states of one layer are counted.

    Attributes:
        steepness: Of the sigmoid.
        bins: Of its range.
        full: Clean images that fill a bin.
    """

    steepness: float
    bins: int
    full: int


#: Its authors' settings for ResNets of four stages, from the pooled features down to the first stage.
CIFAR10 = (Place(100.0, 50, 50), Place(1000.0, 500, 100), Place(0.001, 50, 5), Place(0.001, 500, 100))
IMAGENET = (Place(3000.0, 50, 10), Place(300.0, 50, 500), Place(0.01, 500, 50), Place(1.0, 1000, 5000))


class Coverage:
    """The detector on one network.

    Args:
        model: The network, in evaluation mode.
        layers: Modules that are read, from the last to the first.
        places: Settings of each; those too many for ``layers`` are left out.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], places: Sequence[Place]) -> None:
        self.model = model
        self.read = list(zip(layers, places, strict=False))
        self.counts: list[Tensor] = []

    def fit(self, images: Tensor, batch: int) -> list[NDArray[np.int64]]:
        """Count the states of clean images ``(n, C, H, W)``: for each layer ``(neurons, bins)``."""
        parts = [self._bins(x) for x in images.split(batch)]
        self.counts = [
            nn.functional.one_hot(torch.cat(own), place.bins).sum(0)
            for own, (_, place) in zip(zip(*parts, strict=True), self.read, strict=True)
        ]
        return [count.numpy() for count in self.counts]

    def __call__(self, images: Tensor) -> Tensor:
        """Minus the mean share by which the states of each image are covered ``(B,)``: higher is less usual."""
        found = [
            (count.gather(1, bins.T) / place.full).clamp(max=1).mean(0)
            for count, bins, (_, place) in zip(self.counts, self._bins(images), self.read, strict=True)
        ]
        return -torch.stack(found).mean(0)

    def _bins(self, images: Tensor) -> list[Tensor]:
        """The bin of every neuron's state ``(B, neurons)``, for each layer."""
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, _: object, output: Tensor) -> None:
            outputs[module] = output

        with ExitStack() as stack, torch.enable_grad():
            for layer, _ in self.read:
                stack.callback(layer.register_forward_hook(keep).remove)
            logits = self.model(images.clone().requires_grad_())
            values = [outputs[layer] for layer, _ in self.read]
            slopes = torch.autograd.grad(-logits.log_softmax(1).mean(1).sum(), values)
        found = []
        for z, slope, (_, place) in zip(values, slopes, self.read, strict=True):
            state = torch.sigmoid(place.steepness * z.mean((2, 3)) * slope.mean((2, 3)))
            found.append((state * place.bins).long().clamp(max=place.bins - 1).detach())
        return found
