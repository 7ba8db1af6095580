"""Scores of five methods on clean and challenging digits; a higher score means less reliable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastgrad
from fastgrad.commands.demo.digits import LabelledImages
from fastgrad.detector.report import Report

Method = Callable[[Tensor], NDArray[np.float64]]

# So small a network takes little longer for an image than what is read of it: 1.2 leaves the logits alone.
BUDGET = 1.5
DEFAULT = f"fastgrad, budget {BUDGET}"
WHOLE_NETWORK = "gradient norms, whole network"
LAST_LAYER = "gradient norms, last layer"

# Both sets of gradient norms use the same labels, so that the difference is what the other layers add.
SIGNALS = (("bce", "ones"), ("cross_entropy", "ones"), ("cross_entropy", "predicted"))


def methods(network: nn.Sequential, clean: LabelledImages, seed: int) -> tuple[dict[str, Method], Report]:
    """Fit each method on clean images that the network was not trained on.

    Args:
        network: ends in ``nn.Linear``.
        clean: images ``(n, 1, 24, 24)`` with their labels, which only the probabilities need.
        seed: of the detectors' splits.

    Returns:
        Name to a function from images to scores ``(n,)``, and what the default is made of.
    """
    two_stage = fastgrad.TwoStageModel(network, budget=BUDGET, seed=seed)
    pairs = list(zip(clean.images.split(250), clean.labels.split(250), strict=True))
    two_stage.fit(pairs, clip=(0.0, 1.0), verbose=None)
    extractor = fastgrad.GradientFeatures(network, signals=SIGNALS)

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        found: Tensor = network(images)
        return found.double()

    @torch.no_grad()
    def last_layer(images: Tensor) -> Tensor:
        h = network[:-1](images)
        norms = [fastgrad.target_sqnorm(h, network[-1](h), target, loss=loss) for loss, target in SIGNALS]
        return torch.stack(norms, -1).unsqueeze(-1)

    def whole_network(images: Tensor) -> Tensor:
        return torch.cat([extractor(batch)[1].detach() for batch in images.split(256)])

    def detector(extract: Callable[[Tensor], Tensor]) -> Method:
        fitted = fastgrad.UncertaintyDetector(random_state=seed).fit(extract(clean.images).numpy())
        return lambda images: np.asarray(fitted.decision_function(extract(images).numpy()))

    found: dict[str, Method] = {
        "softmax confidence": lambda images: -logits(images).log_softmax(-1).amax(-1).numpy(),
        "energy": lambda images: -logits(images).logsumexp(-1).numpy(),
        LAST_LAYER: detector(last_layer),
        WHOLE_NETWORK: detector(whole_network),
        DEFAULT: lambda images: two_stage(images).uncertainty.double().numpy(),
    }
    return found, two_stage.report()


def challenging(
    network: nn.Module, digits: Tensor, photographs: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Four sets that the network should not be trusted on, ``(n, 1, 24, 24)`` in [0, 1]."""
    from fastgrad.challenges import PixelRange, fgsm

    pixels = PixelRange.of(digits, clip=(0.0, 1.0))
    noise = 0.25 * torch.randn(digits.shape, generator=generator)
    return {
        "photographs": photographs,
        "uniform noise": torch.rand(digits.shape, generator=generator),
        "noisy digits": (digits + noise).clamp(0, 1),
        "FGSM attack (0.1)": fgsm(network, digits, 0.1, generator, pixels=pixels),
    }
