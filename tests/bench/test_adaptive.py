"""The attack that knows the detector sees the detector that answers, and stays within its radius."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench.detection.adaptive import FORMS, WAYS, attack, auto_attack, away_from, unaware_of, white_box
from fastgrad import TwoStageModel


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    # With some grain: where an image has none, its logarithm has no slope.
    grain = 0.1 * torch.rand(count, 3, 16, 16, generator=generator)
    return 0.9 * nn.functional.interpolate(coarse, (16, 16), mode="bilinear") + grain


@pytest.fixture(scope="module", params=["default", pytest.param("second pass", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> TwoStageModel:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.GELU()]
    layers += [nn.Conv2d(8, 12, 3, 2), nn.BatchNorm2d(12), nn.GELU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    net.train()(images(64, 1))
    # Of an answer that a zoom hardly changes, the change would be rounding.
    net[-1].weight.data.mul_(20)
    loader = [(images(40, seed),) for seed in (2, 3)]
    # Named: a network so small is above any limit.
    return TwoStageModel(net, blocks=FORMS[request.param]).fit(loader, challenges=None)


def test_the_white_box_is_the_detector_with_derivatives(model: TwoStageModel) -> None:
    x = images(5, 7)
    box = white_box(model, x[:3])
    live = model(x)
    logits, score = box.differentiable(x)
    torch.testing.assert_close(logits, live.logits)
    # Uncapped and not calibrated once more, it still orders inputs as the answer does.
    assert torch.equal(score.argsort(), live.uncertainty.argsort())
    # The score has kinks, so what its slopes along a way add up to is compared, not a slope.
    way = 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rise = 0.0
    for share in (torch.arange(200) + 0.5) / 200:
        between = (x + share * way).requires_grad_(True)
        (gradient,) = torch.autograd.grad(box.differentiable(between)[1].sum(), between)
        rise += float((gradient * way).sum()) / 200
    ends = [float(box.differentiable(end)[1].sum()) for end in (x, x + way)]
    assert rise == pytest.approx(ends[1] - ends[0], rel=0.05)


def test_attack_within_its_radius(model: TwoStageModel) -> None:
    x, radius = images(4, 8), 0.2
    box = white_box(model, x[:3])
    labels = model(x).logits.argmax(1)
    found = {weight: attack(box, x, labels, radius, weight, 1, seed=0) for weight in (0.0, None)}
    scores = {}
    for weight, attacked in found.items():
        assert (attacked - x).abs().max() <= radius + 1e-6
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        logits, scores[weight] = box.differentiable(attacked)
        assert bool((away_from(logits, labels) > 0).any())
    both = [away_from(box.differentiable(a)[0], labels) > 0 for a in found.values()]
    chosen = both[0] & both[1]
    assert scores[None][chosen].mean() < scores[0.0][chosen].mean()


def test_an_unaware_attack_needs_the_network_alone(model: TwoStageModel) -> None:
    x, radius = images(4, 8), 0.2
    labels = model(x).logits.argmax(1)
    attacked = attack(unaware_of(model.model.eval()), x, labels, radius, 0.0, 1, seed=0)
    assert (attacked - x).abs().max() <= radius + 1e-6
    misled = model(attacked).logits.argmax(1) != labels
    assert bool(misled.any())
    # What does not mislead is as it was.
    torch.testing.assert_close(attacked[~misled], x[~misled])


@pytest.mark.parametrize("way", WAYS)
def test_images_on_their_way_keep_size_and_range(way: str) -> None:
    pytest.importorskip("PIL")
    x = images(2, 3).clamp(0, 1)
    changed = WAYS[way](x)
    assert changed.shape == x.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (torch.equal(changed, x)) == (way == "")


def test_auto_attack_misleads_within_its_radius() -> None:
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)]
    net = nn.Sequential(*layers).eval().requires_grad_(False)
    x, radius = images(4, 8).clamp(0, 1), 0.1
    labels = net(x).argmax(1)
    attacked = auto_attack(net, x, labels, radius, seed=0)
    assert (attacked - x).abs().max() <= radius + 1e-6
    assert bool((net(attacked).argmax(1) != labels).all())
