"""Trainings of the detection tables: what they do to images, and that they learn."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bench.detection.methods_images  # noqa: F401 - registers the methods
from bench.detection import recipes, train
from bench.detection.architectures import residual_network
from bench.detection.registry import METHODS, NotRun


def test_what_is_done_to_batches_stays_an_image() -> None:
    torch.manual_seed(0)
    model, x, y = residual_network(8), torch.rand(20, 3, 32, 32), torch.randint(10, (20,))
    for change in recipes.CHANGES.values():
        found = change(model, x, y)
        assert found.shape == x.shape
        assert 0 <= found.min() <= found.max() <= 1
        assert not torch.equal(found, x)
        assert not found.requires_grad
    assert (recipes.adversarial(model, x, y, radius=0.1) - x).abs().max() <= 0.1 + 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_sees_the_changed_images() -> None:
    seen: list[torch.Tensor] = []

    def change(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(y)
        return torch.zeros_like(x)

    model = residual_network(8)
    with model.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        train.fit(model, torch.ones(8, 3, 32, 32), torch.arange(8), epochs=1, seed=0, change=change)
    assert seen[0].tolist() != seen[1].tolist()
    assert seen[1].abs().max() == 0


def test_the_filter_takes_single_pixels_out() -> None:
    x = torch.full((2, 3, 8, 8), 0.25)
    x[0, :, 3, 3] = 1
    filtered = recipes.Denoised(nn.Identity())(x)
    assert torch.equal(filtered, torch.full_like(x, 0.25))


def test_views_of_an_image_attract_and_the_last_layer_is_trained() -> None:
    torch.manual_seed(0)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    labels = torch.arange(4).repeat(256)
    images = colours[labels][..., None, None].expand(-1, 3, 32, 32).contiguous()
    model = residual_network(8)
    recipes.contrastive(model, images, labels, epochs=1)
    assert isinstance(model.fc, nn.Linear)
    assert train.accuracy(model.eval(), images, labels) == 1


def test_kernels_are_one_at_their_centroid_and_the_centroids_move() -> None:
    torch.manual_seed(0)
    model, x, y = recipes.Centroids(residual_network(8)), torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    centroids = model.sums / model.counts[:, None]
    assert torch.equal(model.distances(centroids[None])[0], torch.zeros(10))
    before = model.sums.clone()
    model.loss(x, y).backward()
    assert not torch.equal(model.sums, before)
    assert model.weight.grad is not None
    assert model.weight.grad.abs().max() > 0
    assert 0 <= model(x).min() <= model(x).max() <= 1


def test_kernels_that_underflow_still_learn_and_slopes_of_zero_cost_half() -> None:
    torch.manual_seed(0)
    model, y = recipes.Centroids(residual_network(8)), torch.arange(8)
    with torch.no_grad():
        model.sums.fill_(10)
    assert model(torch.rand(8, 3, 32, 32)).max() == 0
    model.loss(torch.rand(8, 3, 32, 32), y).backward()
    assert model.weight.grad is not None
    assert model.weight.grad.abs().max() > 0
    with torch.no_grad():
        model.weight.zero_()
        model.sums.zero_()
    # Kernels are 1: their own class costs nothing, and the nine others what the smallest distance does.
    loss = model.loss(torch.rand(8, 3, 32, 32), y)
    torch.testing.assert_close(float(loss.detach()), 0.5 - 9 * math.log(-math.expm1(-1e-6)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("network", ["vit", "resnet20"])
def test_a_training_of_its_own_is_named(network: str) -> None:
    with pytest.raises(NotRun, match="training of its own"):
        METHODS["DUQ"].fit(SimpleNamespace(subject=SimpleNamespace(network=network)))  # type: ignore[arg-type]
