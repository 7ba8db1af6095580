"""Challenges are seeded, in range and of the form of the images; kinds take turns and name their sources."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from small_images import MEAN, STD, challenged, normalised, photos, small_net
from small_nets import Net
from torch import Tensor

from fastgrad.challenges import (
    CHALLENGES,
    PixelRange,
    challenge_cost,
    challenge_names,
    generate_challenges,
)
from fastgrad.challenges.kinds import STEPS


def test_form_and_range() -> None:
    images = normalised(photos())
    made = challenged(small_net(), images, mean=MEAN, std=STD)
    assert list(made) == challenge_names()
    assert {name.partition("-")[0] for name in made} == set(CHALLENGES)
    low, high = ((c - torch.tensor(MEAN)) / torch.tensor(STD) for c in (0, 1))
    for name, challenge in made.items():
        assert challenge.shape == images.shape
        assert challenge.dtype == images.dtype
        assert not challenge.requires_grad
        assert bool((challenge >= low.view(1, 3, 1, 1)).all()), name
        assert bool((challenge <= high.view(1, 3, 1, 1)).all()), name
        assert bool(((challenge - images).abs().amax((1, 2, 3)) > 1e-3).all()), name
    # Of white some channels would come back one rounding above it.
    white = normalised(torch.ones(8, 3, 4, 4))
    (lit,) = challenged(None, white, ["brightness-1"], mean=MEAN, std=STD).values()
    assert bool((lit <= high.view(1, 3, 1, 1)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "channels"), [(0, 1), (1, 2), (3, 3), (1, 4), (6, 3)])
def test_any_batch_channel_number_and_dtype(batch: int, channels: int, dtype: torch.dtype) -> None:
    images = photos(batch, channels, size=9).to(dtype)
    made = challenged(small_net(channels).to(dtype), images)
    assert all(c.shape == images.shape and c.dtype == dtype and c.isfinite().all() for c in made.values())


def test_seeds() -> None:
    net, images = small_net(), photos()
    everything = challenged(net, images, seed=5)
    state = torch.get_rng_state()
    again = challenged(net, images, ["pgd-2", "noise", "shuffle-3"], seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert list(again) == ["pgd-2", "noise-1", "noise-2", "noise-3", "shuffle-3"]
    for name, challenge in again.items():
        assert torch.equal(challenge, everything[name]), name
    other = challenged(net, images, ["pgd-2", "noise-1", "shuffle-3"], seed=6)
    assert not any(torch.equal(challenge, everything[name]) for name, challenge in other.items())
    turns = [[batch.kinds for batch in generate_challenges(net, images, seed=seed)] for seed in (5, 5, 6)]
    assert turns[0] == turns[1] != turns[2]


def test_batch_size_changes_nothing() -> None:
    net, images = small_net(), photos()

    def made(size: int) -> Tensor:
        batches = list(generate_challenges(net, images, names=["fgsm"], batch_size=size))
        sources = torch.cat([batch.sources for batch in batches])
        return torch.cat([batch.inputs for batch in batches])[sources.argsort(stable=True)]

    torch.testing.assert_close(made(2), made(6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("inference", [True, False])
def test_modes_of_pytorch_change_nothing(inference: bool) -> None:
    net, images = small_net(), photos(size=15)
    expected = challenged(net, images)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(inference):
            made = challenged(net, images)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        made |= challenged(None, images, [name for name, kind in CHALLENGES.items() if not kind.passes])
    for name, challenge in made.items():
        assert challenge.dtype == torch.float32
        assert torch.equal(challenge, expected[name]), name


def test_normalised_and_unit_images() -> None:
    net, unit, names = small_net(), photos(), ["pgd-2", "contrast-2"]
    inside = challenged(Net(lambda own, x: own.net(normalised(x)), net=net), unit, names)
    outside = challenged(net, normalised(unit), names, mean=MEAN, std=STD)
    for name, challenge in inside.items():
        torch.testing.assert_close(outside[name], normalised(challenge), rtol=0, atol=2e-5)


def test_severity_orders_the_distance() -> None:
    images = photos(batch=12)
    made = challenged(small_net(), images, ["noise", "contrast", "brightness", "pgd", "mixture"])
    for kind in ("noise", "contrast", "brightness", "pgd", "mixture"):
        distances = [float((made[f"{kind}-{n}"] - images).square().mean()) for n in (1, 2, 3)]
        assert distances == sorted(distances), kind


@pytest.mark.parametrize("parts", [1, 4])
def test_kinds_take_turns(parts: int) -> None:
    net, images = small_net(), photos(60)
    found = []
    for part in range(parts):
        own = images.tensor_split(parts)[part]
        first = part * 60 // parts
        pixels = PixelRange.of(images)
        made = list(generate_challenges(net, own, each=3, first=first, seed=2, pixels=pixels, batch_size=16))
        assert all(len(batch.inputs) == len(batch.kinds) == len(batch.sources) for batch in made)
        # Kinds share batches; only the last one is short.
        assert all(16 <= len(batch.kinds) < 32 for batch in made[:-1])
        found += [pair for batch in made for pair in zip(batch.sources.tolist(), batch.kinds, strict=True)]
    assert Counter(source for source, _ in found) == dict.fromkeys(range(60), 3)
    counts = Counter(kind for _, kind in found)
    attacks = {name: kind for name, kind in CHALLENGES.items() if kind.passes}
    others = {name: kind for name, kind in CHALLENGES.items() if not kind.passes}
    attacked = {"fgsm": 9, "pgd": 9, "compressed_fgsm": 18, "compressed_pgd": 18}
    assert {name: counts[name] for name in attacks} == attacked
    turns = 126 / len(challenge_names(list(others)))
    for name, kind in others.items():
        assert abs(counts[name] - turns * len(kind.strengths)) <= len(kind.strengths)


def test_unchanged_images_are_left_out() -> None:
    flat = photos(24)
    flat[:20] = flat[:20, :, :1, :1]
    whole = Net(lambda net, x: net.net((255 * x).round() / 255), net=small_net())  # whose gradient is 0
    for model, images in ((small_net(), flat), (whole, photos(40))):
        for pixels in (PixelRange.of(images), PixelRange.of(normalised(images), mean=MEAN, std=STD)):
            clean = pixels.from_unit(images)
            made = list(generate_challenges(model, clean, each=9, pixels=pixels))
            for batch in made:
                changed = pixels.to_unit(batch.inputs) - images[batch.sources]
                assert float(changed.abs().amax((1, 2, 3)).min()) > 1 / 512
            kinds = Counter(kind for batch in made for kind in batch.kinds)
            assert ("fgsm" in kinds) == (model is not whole)
            assert 0.5 * 9 * len(images) < kinds.total() < 9 * len(images)


def test_sources() -> None:
    images = photos(8)
    made = list(generate_challenges(None, images, names=["contrast"], each=3, pixels=PixelRange.of(images)))
    for batch in made:
        for challenge, source in zip(batch.inputs, batch.sources, strict=True):
            both = torch.stack([challenge.flatten(), images[source].flatten()])
            assert float(torch.corrcoef(both)[0, 1]) > 0.999
    again = list(generate_challenges(None, images, names=["contrast"], each=3))
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(made, again, strict=True))


def counting(net: Any, x: Tensor) -> Tensor:
    """Counts the images that it sees."""
    net.calls += len(x)
    return x.flatten(1)[:, :4]


@pytest.mark.parametrize(
    ("names", "each", "gradients", "starts"),
    [
        (["pgd"], 3, 3 * STEPS, 3),
        (["pgd", "compressed_pgd"], 3, STEPS, 1),
        (["pgd", "compressed_pgd"], 1, STEPS, 1),
        (["pgd", "compressed_pgd"], 2, 4 * STEPS / 3, 4 / 3),
        (["compressed_pgd"], 1, STEPS, 1),
        (["compressed_pgd-2"], 2, STEPS, 1),
        (["fgsm", "compressed_fgsm"], 3, 1, 0),
        (None, 3, 0.3 * (1 + STEPS) / 2, 0.3 / 2),
        (None, 1, 0.3 * (1 + STEPS) / 2, 0.3 / 2),
    ],
)
def test_attacks_shared_with_jpeg(names: list[str] | None, each: int, gradients: float, starts: float) -> None:
    images, net = photos(60), Net(counting, calls=0)
    made = list(generate_challenges(net, images, names=names, each=each))
    assert sum(len(batch.kinds) for batch in made) == 60 * each
    # The first gradient of FGSM finds the prediction on its way; the random start of PGD needs one more pass.
    assert net.calls == pytest.approx(60 * (gradients + starts))
    assert challenge_cost(each, names=names) == pytest.approx(each + 2.4 * gradients + starts)


def test_strengths_of_attacks_share_a_batch() -> None:
    images = photos(12)
    (batch,) = generate_challenges(Net(counting, calls=0), images, names=["pgd", "compressed_pgd"], each=3)
    change = (batch.inputs - images[batch.sources]).abs().amax((1, 2, 3))
    plain = torch.tensor([kind == "pgd" for kind in batch.kinds])
    assert {round(255 * float(value)) for value in change[plain]} == {2, 4, 8}
    assert bool((change[~plain] > change[plain].min()).all())
    twice = batch.inputs[~plain].unflatten(0, (12, 2))
    assert bool((twice[:, 0] != twice[:, 1]).any()), "of other qualities"


def test_numbers_of_numpy() -> None:
    def made(*numbers: Any) -> list[Tensor]:
        given = dict(zip(("each", "seed", "batch_size"), numbers, strict=True))
        return [batch.inputs for batch in generate_challenges(small_net(), photos(), names=["fgsm"], **given)]

    assert all(torch.equal(a, b) for a, b in zip(made(3, 1, 2), made(*np.array([3, 1, 2])), strict=True))
    black_and_white = challenged(None, photos(), ["noise-1"], clip=(np.float32(0), np.int64(1)))
    assert torch.equal(black_and_white["noise-1"], challenged(None, photos(), ["noise-1"])["noise-1"])
