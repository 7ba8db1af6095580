"""NAC's states are what its paper says, and images that it was fitted on are covered."""

from __future__ import annotations

import numpy as np
import torch

from bench.detection.architectures import residual_network
from bench.detection.coverage import Coverage, Place

PLACES = (Place(100.0, 50, 3), Place(10.0, 20, 2))


def test_counts_and_scores_follow_from_the_states_of_each_image() -> None:
    torch.manual_seed(0)
    model = residual_network(width=4).eval().double()
    images, others = torch.rand(12, 3, 32, 32).double(), torch.rand(5, 3, 32, 32).double()
    nac = Coverage(model, [model.pool, *reversed(model.stages[:-1])], PLACES)
    counts = nac.fit(images, 5)

    def bins(x: torch.Tensor) -> list[np.ndarray]:
        # Uniform against the predicted: their divergence is minus the mean of the log probabilities, up to a constant.
        h = model.stages[1](model.stages[0](model.stem(model.normalize(x[None])))).detach().requires_grad_()
        pooled = model.pool(model.stages[2](h))
        divergence = -(model.fc(pooled.flatten(1)).log_softmax(1).mean())
        slopes = torch.autograd.grad(divergence, (pooled, h))
        found = []
        for place, z, slope in zip(PLACES, (pooled, h), slopes, strict=True):
            state = 1 / (1 + torch.exp(-place.steepness * z.mean((2, 3)) * slope.mean((2, 3))))[0]
            found.append(
                np.minimum((state * place.bins).floor().detach().numpy(), place.bins - 1).astype(int)
            )
        return found

    expected = [np.zeros_like(count) for count in counts]
    for image in images:
        for table, own in zip(expected, bins(image), strict=True):
            table[np.arange(len(own)), own] += 1
    for count, table in zip(counts, expected, strict=True):
        np.testing.assert_array_equal(count, table)
    scores = [
        -np.mean([
            np.minimum(table[np.arange(len(own)), own] / place.full, 1).mean()
            for table, own, place in zip(expected, bins(image), PLACES, strict=True)
        ])
        for image in others
    ]  # fmt: skip
    # Shares of counts are exact in single precision but for their means.
    np.testing.assert_allclose(nac(others).numpy(), scores, rtol=1e-6)
    # An image that was counted is at least one of those that fill each of its bins.
    least = np.mean([1 / place.full for place in PLACES])
    assert (-nac(images).numpy() >= least * (1 - 1e-6)).all()
    assert not any(layer._forward_hooks for layer in model.modules())
