"""Scores of five methods on clean and challenging digits; a higher score means less reliable."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastgrad
from fastgrad.commands.demo.digits import LabelledImages
from fastgrad.commands.demo.network import logits_in_batches
from fastgrad.detector.report import Report

Scores = NDArray[np.float64]
Method = Callable[[Tensor], Scores]

# So small a network takes little longer for an image than what is read of it: 1.2 leaves the logits alone.
BUDGET = 1.5
DEFAULT = f"fastgrad, budget {BUDGET}"
WHOLE_NETWORK = "gradient norms, whole network"
LAST_LAYER = "gradient norms, last layer"

# Both sets of gradient norms use the same labels, so that the difference is what the other layers add.
SIGNALS = (("bce", "ones"), ("cross_entropy", "ones"), ("cross_entropy", "predicted"))


def in_batches(images: Iterable[Tensor], extract: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
    """Apply ``extract`` to every batch."""
    return torch.cat([extract(batch) for batch in images]).numpy()


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
    body, head = network[:-1], network[-1]
    extractor = fastgrad.GradientFeatures(network, signals=SIGNALS)

    def last_layer(batch: Tensor) -> Tensor:
        with torch.no_grad():
            h = body(batch)
            z = head(h)
            norms = [fastgrad.target_sqnorm(h, z, target, loss=loss) for loss, target in SIGNALS]
            return torch.stack(norms, -1).unsqueeze(-1)

    def whole_network(batch: Tensor) -> Tensor:
        return extractor(batch)[1].detach()

    def detector(extract: Callable[[Tensor], Tensor]) -> Method:
        fitted = fastgrad.UncertaintyDetector(random_state=seed)
        fitted.fit(in_batches(clean.images.split(256), extract))
        return lambda images: np.asarray(fitted.decision_function(in_batches(images.split(256), extract)))

    def confidence(images: Tensor) -> Scores:
        return -logits_in_batches(network, images).double().log_softmax(-1).amax(-1).numpy()

    def energy(images: Tensor) -> Scores:
        return -logits_in_batches(network, images).double().logsumexp(-1).numpy()

    def default(images: Tensor) -> Scores:
        return in_batches(images.split(256), lambda x: two_stage(x).uncertainty).astype(float)

    found = {
        "softmax confidence": confidence,
        "energy": energy,
        LAST_LAYER: detector(last_layer),
        WHOLE_NETWORK: detector(whole_network),
        DEFAULT: default,
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
