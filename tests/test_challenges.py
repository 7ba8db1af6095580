"""Challenges are what they claim, seeded, in range, and leave the model alone."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Net
from torch import nn
from torch.ao import quantization

from fastgrad.challenges import (
    CHALLENGES,
    PixelRange,
    challenge_cost,
    challenge_names,
    fgsm,
    generate_challenges,
    iter_challenges,
    pgd,
)
from fastgrad.challenges.generate import STEPS
from fastgrad.evaluation import evaluating

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def small_net(channels: int = 3, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    with torch.no_grad():
        net[-1].weight.mul_(scale)
    return net


def photos(batch: int = 6, channels: int = 3, size: int = 16, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, size, size, generator=generator)


def normalised(unit: torch.Tensor) -> torch.Tensor:
    return (unit - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def test_all_challenges_have_the_form_of_the_images_and_differ_from_them() -> None:
    images = normalised(photos())
    made = generate_challenges(small_net(), images, mean=MEAN, std=STD)
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
    (lit,) = generate_challenges(None, white, names=["brightness-1"], mean=MEAN, std=STD).values()
    assert bool((lit <= high.view(1, 3, 1, 1)).all())


@pytest.mark.parametrize("size", [3, 8])
def test_blur_alters_small_images(size: int) -> None:
    images = photos(size=size)
    for name, challenge in generate_challenges(None, images, names=["blur"]).items():
        assert bool(((challenge - images).abs().amax((1, 2, 3)) > 0.05).all()), name


def test_same_seed_same_challenges_whatever_else_is_made() -> None:
    net, images = small_net(), photos()
    everything = generate_challenges(net, images, seed=5)
    state = torch.get_rng_state()
    again = generate_challenges(net, images, names=["pgd-2", "noise", "shuffle-3"], seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert list(again) == ["pgd-2", "noise-1", "noise-2", "noise-3", "shuffle-3"]
    for name, challenge in again.items():
        assert torch.equal(challenge, everything[name]), name
    other = generate_challenges(net, images, names=["pgd-2", "noise-1", "shuffle-3"], seed=6)
    assert not any(torch.equal(challenge, everything[name]) for name, challenge in other.items())
    turns = [[batch.kinds for batch in iter_challenges(net, images, seed=seed)] for seed in (5, 5, 6)]
    assert turns[0] == turns[1] != turns[2]


def test_challenges_do_not_depend_on_the_batch_size() -> None:
    net, images = small_net(), photos()
    attacked = ["pgd", "fgsm", "compressed_pgd"]
    together, apart = (generate_challenges(net, images, names=attacked, batch_size=size) for size in (6, 2))
    for name, challenge in together.items():
        torch.testing.assert_close(challenge, apart[name], rtol=0, atol=1e-6, msg=name)


def test_severity_orders_the_distance() -> None:
    images = photos(batch=12)
    made = generate_challenges(small_net(), images, names=["noise", "contrast", "brightness", "pgd", "mixture"])
    for kind in ("noise", "contrast", "brightness", "pgd", "mixture"):
        distances = [float((made[f"{kind}-{n}"] - images).square().mean()) for n in (1, 2, 3)]
        assert distances == sorted(distances), kind
    assert list(generate_challenges(None, images, names=["noise", "inversion"], severities=[2])) == ["noise-2"]


class Merging(nn.Linear):
    def train(self, mode: bool = True) -> Any:
        self.weight.data.add_(1 if mode else -1)
        return super().train(mode)


def observing(own: Any, x: torch.Tensor) -> torch.Tensor:
    """Keeps the range of what it sees, as a network to be quantized does; a first input makes room for it."""
    own.highest.resize_(3).copy_(x.detach().amax((0, 2, 3)))
    return own.net(x)


def counted(own: Any, x: torch.Tensor) -> torch.Tensor:
    own.calls = own.calls + 1
    return own.net(x)


def growing(own: Any, x: torch.Tensor) -> torch.Tensor:
    z = own.net(x)
    if own.length < z.shape[1]:
        own.length = z.shape[1]
        own.table = torch.arange(1.0, own.length + 1)
    return z * own.table[: z.shape[1]]


#: Networks that change themselves when they run, or when their modes change.
CHANGING: dict[str, Callable[[], nn.Module]] = {
    "nothing": small_net,
    "a buffer's values and size": lambda: Net(observing, net=small_net(), highest=nn.Buffer(torch.empty(0))),
    # Kernels of quantization write without a new version.
    "quantization": lambda: nn.Sequential(quantization.FusedMovingAvgObsFakeQuantize(), *small_net()),
    "a buffer": lambda: Net(counted, net=small_net(), calls=nn.Buffer(torch.zeros(()))),
    "weights with the mode": lambda: nn.Sequential(nn.Flatten(), Merging(768, 5)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("changes", CHANGING)
def test_the_model_is_left_as_it_was(changes: str, called: bool, training: bool) -> None:
    net = CHANGING[changes]().train(training)
    list(net.modules())[-1].eval()
    if called:
        net(photos()).sum().backward()
    modes, buffers = [m.training for m in net.modules()], dict(net.named_buffers())
    values, gradients = ([t.clone() for t in tensors] for tensors in (net.state_dict().values(), grads(net)))
    with torch.no_grad():
        generate_challenges(net, 0.5 + photos() / 2)
    assert [m.training for m in net.modules()] == modes
    assert all(found is buffers[name] for name, found in net.named_buffers())
    assert all(map(torch.equal, net.state_dict().values(), values))
    assert all(map(torch.equal, grads(net), gradients))
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def grads(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def test_a_table_that_grows_stays_as_long_as_its_length_says() -> None:
    model = Net(growing, net=small_net(), length=0, table=nn.Buffer(torch.zeros(0), persistent=False))
    generate_challenges(model, photos(), names=["fgsm"])
    assert len(model.table) == model.length > 0


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(1).expand(1 << 40),
        nn.UninitializedBuffer(),
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.zeros(2, dtype=torch.uint8).view(torch.bits8),
    ],
    ids=["expanded", "lazy", "meta", "sparse", "bits"],
)
def test_buffers_that_have_no_copy_do_not_matter(buffer: torch.Tensor) -> None:
    net = small_net()
    net.register_buffer("mask", buffer)
    fgsm(net, photos(), 0.1, torch.Generator(), pixels=PixelRange.of(photos()))
    assert net.mask is buffer


@pytest.mark.parametrize("wrapped", [False, True])
def test_modes_return_from_two_threads(wrapped: bool) -> None:
    net, inside, ended = small_net().train(), [threading.Event(), threading.Event()], threading.Event()

    def first() -> None:
        with evaluating(net):
            inside[0].set()
            inside[1].wait(0.5)  # where the other does not wait
        ended.set()

    def second() -> None:
        inside[0].wait()
        with evaluating(nn.Sequential(net) if wrapped else net):
            inside[1].set()
            ended.wait()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result(timeout=60)
    assert all(module.training for module in net.modules())


def test_two_networks_do_not_wait_for_each_other() -> None:
    both = threading.Barrier(2)

    def attack(net: nn.Module) -> None:
        with evaluating(net):
            both.wait(timeout=10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attack, [small_net(), small_net()]))


def test_modes_return_after_an_error() -> None:
    def broken(net: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    net = nn.Sequential(Net(broken)).train()
    with pytest.raises(RuntimeError, match="no"):
        generate_challenges(net, photos(), names=["pgd-1"])
    assert net.training
    assert net[0].training


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_attacks_stay_in_their_ball_and_move_the_prediction(scale: float) -> None:
    # At scale 1000 the margins pass 17, where float32 cross-entropy has no gradient.
    net = small_net(scale=scale).eval()
    images = photos(batch=10)
    made = generate_challenges(net, images, names=["pgd"])
    with torch.no_grad():
        clean = net(images)
        top = clean.argmax(1, keepdim=True)

        def margin(logits: torch.Tensor) -> torch.Tensor:
            others = logits.scatter(1, top, -torch.inf).logsumexp(1)
            return logits.gather(1, top)[:, 0] - others

        margins = [margin(clean)] + [margin(net(made[f"pgd-{n}"])) for n in (1, 2, 3)]
    for n, epsilon in enumerate(CHALLENGES["pgd"].strengths, 1):
        # float32 rounding of values below one.
        assert float((made[f"pgd-{n}"] - images).abs().max()) <= epsilon + 2e-7
        assert bool((margins[n] < margins[0]).all())


def test_attack_is_the_published_step() -> None:
    net = small_net().double().eval()
    images = photos(batch=4).double()
    point = images.clone().requires_grad_()
    logits = net(point)
    loss = nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum")
    (slope,) = torch.autograd.grad(loss, point)
    expected = (images + 8 / 255 * slope.sign()).clamp(0, 1)
    pixels = PixelRange.of(images, clip=(0, 1))
    made = fgsm(net, images, 8 / 255, torch.Generator(), pixels=pixels)
    torch.testing.assert_close(made, expected, rtol=0, atol=4e-16)
    # Several steps lead away from the prediction of the image itself, whatever is predicted on the way.
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).double()
    point = (images + 8 / 255 * (2 * start - 1)).clamp(0, 1)
    for _ in range(5):
        loss = nn.functional.cross_entropy(net(point.requires_grad_()), logits.argmax(1), reduction="sum")
        (slope,) = torch.autograd.grad(loss, point)
        point = (point.detach() + 4 / 255 * slope.sign()).clamp(images - 8 / 255, images + 8 / 255).clamp(0, 1)
    made = pgd(net, images, 8 / 255, torch.Generator().manual_seed(0), pixels=pixels, steps=5)
    torch.testing.assert_close(made, point, rtol=0, atol=1e-15)
    # The sign of one logit is the prediction, as of two logits that differ by it.
    middle = logits[:, :1].detach().mean()
    one = Net(lambda own, x: own.net(x)[:, :1] - middle, net=net)
    two = Net(lambda own, x: nn.functional.pad(own.one(x), (1, 0)), one=one)
    assert torch.equal(*(fgsm(model, images, 0.1, torch.Generator(), pixels=pixels) for model in (one, two)))


def test_normalised_and_unit_images_get_the_same_attack() -> None:
    net, unit, names = small_net(), photos(), ["pgd-2", "contrast-2"]
    inside = generate_challenges(Net(lambda own, x: own.net(normalised(x)), net=net), unit, names=names)
    outside = generate_challenges(net, normalised(unit), names=names, mean=MEAN, std=STD)
    for name, challenge in inside.items():
        torch.testing.assert_close(outside[name], normalised(challenge), rtol=0, atol=2e-5)


def test_range_is_read_from_the_data() -> None:
    unit = photos()
    for scaled, low, high in ((unit, 0, 1), (unit * 255, 0, 255), (unit * 0.3, 0, 1)):
        pixels = PixelRange.of(scaled)
        assert (float(pixels.low), float(pixels.high)) == (low, high)
    # Levels of four bits or twelve, and what overshoots white or goes below black, are no bytes.
    for ready in (unit * 16, unit * 4095, unit * 1.02, normalised(unit), unit * 2 - 1):
        pixels = PixelRange.of(ready)
        assert torch.equal(pixels.low.flatten(), ready.amin((0, 2, 3)))
        assert torch.equal(pixels.high.flatten(), ready.amax((0, 2, 3)))
    flat = PixelRange.of(torch.full((2, 1, 4, 4), -3.0))
    assert float(flat.high - flat.low) == 1
    told = PixelRange.of(2 * unit - 1, clip=(0, 255), mean=[127.5] * 3, std=[127.5] * 3)
    assert float(told.low[0, 0]) == -1


@pytest.mark.parametrize("inference", [True, False])
def test_what_is_made_depends_on_no_mode_of_pytorch(inference: bool) -> None:
    net, images = small_net(), photos(size=15)
    expected = generate_challenges(net, images)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(inference):
            made = generate_challenges(net, images)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        made |= generate_challenges(None, images, names=[name for name, kind in CHALLENGES.items() if not kind.passes])
    for name, challenge in made.items():
        assert challenge.dtype == torch.float32
        assert torch.equal(challenge, expected[name]), name


@pytest.mark.parametrize(
    ("told", "images", "words"),
    [
        ({"clip": (0, 1)}, [photos(), 255 * photos()], r"range that clip, mean and std give, \[0, 1\]; they reached"),
        ({"mean": MEAN, "std": STD}, [photos() - 3], r"reached \[-3, "),
        ({}, [], "images must hold at least one batch"),
        ({}, [photos()[0]], r"images must have shape \(B, C, H, W\); it was \(3, "),
        ({}, [photos() / 0], "images must be finite"),
        ({}, [photos(), 255 * photos(2)], r"share one range; 6 of 8 lie within \[0, 1\], others reach 25\d"),
    ],
)
def test_ranges_that_contradict_are_refused(told: dict, images: list[torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PixelRange.of(images, **told)
    with pytest.raises(TypeError, match="images must"):
        PixelRange.of([*images, None], **told)  # type: ignore[list-item]
    assert float(PixelRange.of([photos(), 255 * photos(2)], clip=(0, 255)).high) == 255
    # The whole sample decides: the first batch alone would pass for unit images.
    black = torch.zeros(1, 3, 8, 8)
    assert float(PixelRange.of([black, 255 * photos(2)]).high) == 255
    half = normalised(photos()).half()
    assert bool(torch.isfinite(PixelRange.of(half, mean=MEAN, std=STD).low).all())


@pytest.mark.parametrize("parts", [1, 4])
def test_kinds_take_turns_over_all_inputs_in_whatever_parts_they_come(parts: int) -> None:
    net, images = small_net(), photos(60)
    found = []
    for part in range(parts):
        own = images.tensor_split(parts)[part]
        first = part * 60 // parts
        pixels = PixelRange.of(images)
        made = list(iter_challenges(net, own, each=3, first=first, seed=2, pixels=pixels, batch_size=16))
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


def test_what_stays_as_it_is_is_no_challenge() -> None:
    flat = photos(24)
    flat[:20] = flat[:20, :, :1, :1]
    whole = Net(lambda net, x: net.net((255 * x).round() / 255), net=small_net())  # whose gradient is 0
    for model, images in ((small_net(), flat), (whole, photos(40))):
        for pixels in (PixelRange.of(images), PixelRange.of(normalised(images), mean=MEAN, std=STD)):
            clean = pixels.from_unit(images)
            made = list(iter_challenges(model, clean, each=9, pixels=pixels))
            for batch in made:
                changed = pixels.to_unit(batch.inputs) - images[batch.sources]
                assert float(changed.abs().amax((1, 2, 3)).min()) > 1 / 512
            kinds = Counter(kind for batch in made for kind in batch.kinds)
            assert ("fgsm" in kinds) == (model is not whole)
            assert 0.5 * 9 * len(images) < kinds.total() < 9 * len(images)


def test_no_image_is_mixed_with_itself() -> None:
    images = photos(4)
    for batch in iter_challenges(None, images, names=["mixture"], each=9):
        assert bool(((batch.inputs - images[batch.sources]).abs().amax((1, 2, 3)) > 0.05).all())


def test_challenges_come_from_the_inputs_that_they_name() -> None:
    images = photos(8)
    made = list(iter_challenges(None, images, names=["contrast"], each=3, pixels=PixelRange.of(images)))
    for batch in made:
        for challenge, source in zip(batch.inputs, batch.sources, strict=True):
            both = torch.stack([challenge.flatten(), images[source].flatten()])
            assert float(torch.corrcoef(both)[0, 1]) > 0.999
    again = list(iter_challenges(None, images, names=["contrast"], each=3))
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(made, again, strict=True))


def counting(net: Any, x: torch.Tensor) -> torch.Tensor:
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
def test_what_goes_through_jpeg_shares_its_attack(
    names: list[str] | None, each: int, gradients: float, starts: float
) -> None:
    images, net = photos(60), Net(counting, calls=0)
    made = list(iter_challenges(net, images, names=names, each=each))
    assert sum(len(batch.kinds) for batch in made) == 60 * each
    # The first gradient of FGSM finds the prediction on its way; the random start of PGD needs one more pass.
    assert net.calls == pytest.approx(60 * (gradients + starts))
    assert challenge_cost(each, names=names) == pytest.approx(each + 2.4 * gradients + starts)


def test_attacks_of_all_strengths_are_made_in_one_batch() -> None:
    images = photos(12)
    (batch,) = iter_challenges(Net(counting, calls=0), images, names=["pgd", "compressed_pgd"], each=3)
    change = (batch.inputs - images[batch.sources]).abs().amax((1, 2, 3))
    plain = torch.tensor([kind == "pgd" for kind in batch.kinds])
    assert {round(255 * float(value)) for value in change[plain]} == {2, 4, 8}
    assert bool((change[~plain] > change[plain].min()).all())
    twice = batch.inputs[~plain].unflatten(0, (12, 2))
    assert bool((twice[:, 0] != twice[:, 1]).any()), "of other qualities"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "channels"), [(0, 1), (1, 2), (3, 3), (1, 4), (6, 3)])
def test_any_batch_channel_number_and_dtype(batch: int, channels: int, dtype: torch.dtype) -> None:
    images = photos(batch, channels, size=9).to(dtype)
    made = generate_challenges(small_net(channels).to(dtype), images)
    assert all(c.shape == images.shape and c.dtype == dtype and c.isfinite().all() for c in made.values())


def test_shuffle_moves_every_patch_and_keeps_all_pixels() -> None:
    images = photos(size=16)
    made = generate_challenges(None, images, names=["shuffle-2"])["shuffle-2"]
    assert torch.equal(made.flatten(2).sort(2).values, images.flatten(2).sort(2).values)
    patches = (made != images).reshape(6, 3, 4, 4, 4, 4).any(5).any(3).any(1)
    assert bool(patches.all())


def test_phase_keeps_the_spectrum_and_moves_all_channels_alike() -> None:
    grey = (0.4 + 0.2 * photos(channels=1, size=15)).expand(-1, 3, -1, -1)
    made = generate_challenges(None, grey, names=["phase-3"], clip=(0, 1))["phase-3"]
    assert bool(((made > 0) & (made < 1)).all())
    spectra = [torch.fft.rfft2(images.double()).abs() for images in (grey, made)]
    torch.testing.assert_close(spectra[1], spectra[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(made[:, 0], made[:, 2])


def test_magnification_shows_a_part_and_tiling_repeats_the_whole() -> None:
    ramp = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    made = generate_challenges(None, ramp, names=["magnification", "tiling"], clip=(0, 1))
    for level, factor in enumerate(CHALLENGES["magnification"].strengths, 1):
        spread = made[f"magnification-{level}"].amax((1, 2, 3)) - made[f"magnification-{level}"].amin((1, 2, 3))
        assert float(spread.max()) < 1.2 / factor
    for level, cells in enumerate(CHALLENGES["tiling"].strengths, 1):
        tiled = made[f"tiling-{level}"]
        assert torch.equal(tiled, tiled.roll(32 // int(cells), -1))
        torch.testing.assert_close(tiled.mean((1, 2, 3)), ramp.mean((1, 2, 3)), rtol=0, atol=1e-5)


def test_blur_and_compression_do_what_they_say() -> None:
    constant = torch.full((1, 3, 32, 32), 0.5)
    made = generate_challenges(None, constant, names=["blur", "compression"])
    for name, challenge in made.items():
        # JPEG rounds to bytes.
        assert float((challenge - constant).abs().max()) <= (1e-6 if "blur" in name else 2 / 255)
    rough = photos(size=32)
    roughness = [
        float(c.diff(dim=-1).square().mean()) for c in generate_challenges(None, rough, names=["blur"]).values()
    ]
    assert roughness == sorted(roughness, reverse=True)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"names": ["fog"]}, ValueError, "names must be one of"),
        ({"names": ["noise-9"]}, ValueError, "noise-9"),
        ({"names": "noise"}, TypeError, "sequence"),
        ({"names": [3]}, ValueError, "names must be one of .* it was '3'"),
        ({"severities": [4]}, ValueError, "severities"),
        ({"severities": 2}, TypeError, "severities must be a sequence; it was 2"),
        ({"clip": (1, 0)}, ValueError, "clip"),
        ({"mean": [0.5] * 3}, ValueError, "together"),
        ({"mean": [0.5], "std": [0.5]}, ValueError, "per channel"),
        ({"mean": [0.5] * 3, "std": [0.0] * 3}, ValueError, "std"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"seed": "x"}, ValueError, "seed must be an integer of at least 0; it was 'x'"),
        ({"model": None}, ValueError, "compressed_fgsm, compressed_pgd, fgsm, pgd; it was None"),
        ({"model": "resnet"}, TypeError, "model"),
        ({"images": torch.zeros(3, 8, 8)}, ValueError, "B, C, H, W"),
        ({"images": torch.zeros(2, 3, 0, 8)}, ValueError, "B, C, H, W"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError, "images"),
        ({"images": torch.full((1, 3, 8, 8), torch.nan)}, ValueError, "finite"),
        ({"images": torch.ones(1, 3, 8, 8, device="meta")}, ValueError, "images must be dense and hold values"),
        ({"images": torch.ones(1, 3, 8, 8).to_sparse()}, ValueError, "images must be dense .* layout torch.sparse_coo"),
    ],
)
def test_errors_name_the_argument(kwargs: dict, error: type[Exception], words: str) -> None:
    arguments = {"model": small_net(), "images": photos()} | kwargs
    with pytest.raises(error, match=words):
        generate_challenges(arguments.pop("model"), arguments.pop("images"), **arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    def made(*numbers: Any) -> list[torch.Tensor]:
        given = dict(zip(("each", "seed", "batch_size"), numbers, strict=True))
        return [batch.inputs for batch in iter_challenges(small_net(), photos(), names=["fgsm"], **given)]

    assert all(torch.equal(a, b) for a, b in zip(made(3, 1, 2), made(*np.array([3, 1, 2])), strict=True))
    black_and_white = generate_challenges(None, photos(), names=["noise-1"], clip=(np.float32(0), np.int64(1)))
    assert torch.equal(black_and_white["noise-1"], generate_challenges(None, photos(), names=["noise-1"])["noise-1"])


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_frozen_script_has_no_mode_and_is_attacked() -> None:
    net, pixels = small_net().eval(), PixelRange.of(photos(), clip=(0, 1))
    frozen: nn.Module = torch.jit.freeze(torch.jit.trace(net, photos()))
    expected, made = (pgd(one, photos(), 0.1, torch.Generator().manual_seed(0), pixels=pixels) for one in (net, frozen))
    assert ((made - expected).abs() > 0.01).float().mean() < 0.01
    assert list(iter_challenges(frozen, photos(), names=["fgsm"]))


def attacked(attack: Any, **given: Any) -> Any:
    arguments = {"model": small_net(), "unit": photos(), "epsilon": 0.1, "generator": torch.Generator().manual_seed(0)}
    return attack(**{**arguments, "pixels": PixelRange.of(photos(), clip=(0, 1)), **given})


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_attacks_run_in_evaluation_mode_and_with_gradients(attack: Any) -> None:
    net = small_net()
    expected, before = attacked(attack, model=copy.deepcopy(net).eval()), copy.deepcopy(net.state_dict())
    with torch.inference_mode():
        assert torch.equal(attacked(attack, model=net), expected)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"model": print}, TypeError, "model must be a Module"),
        ({"unit": [0.5]}, TypeError, "unit must be a torch.Tensor"),
        ({"unit": torch.zeros(3, 8, 8)}, ValueError, "unit must have shape"),
        ({"unit": 255 * photos()}, ValueError, r"unit must lie in \[0, 1\] .*; it reached \["),
        ({"unit": photos() - torch.nan}, ValueError, "unit must be finite"),
        ({"epsilon": "8/255"}, TypeError, "epsilon must be a number"),
        ({"epsilon": torch.tensor(8)}, TypeError, "epsilon must have a floating dtype"),
        ({"epsilon": -0.1}, ValueError, "epsilon must not be negative"),
        ({"pixels": (0, 1)}, TypeError, "pixels must be a PixelRange"),
    ],
)
def test_attacks_that_are_refused(attack: Any, given: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attacked(attack, **given)


def turns(images: Any = None, **given: Any) -> Any:
    return iter_challenges(None, photos() if images is None else images, **{"names": ["noise"], **given})


ONE = torch.zeros(1)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: turns(names=[]), "names must"),
    (lambda: turns(first=1.5), "first must"),
    (lambda: turns(seed=None), "seed must"),
    (lambda: turns(each=0), "each must"),
    (lambda: turns(pixels=(0, 1)), "pixels must"),
    (lambda: turns(photos() / 0, pixels=PixelRange.of(photos())), "images must be finite"),
    (lambda: challenge_cost(0), "each must be an integer of at least 1; it was 0"),
    (lambda: attacked(pgd, steps=0), "steps must be an integer of at least 1; it was 0"),
    (lambda: attacked(pgd, generator=0), "generator must be a Generator; it was int"),
    (lambda: PixelRange(1, 0), "low must be a torch.Tensor"),  # type: ignore[arg-type]
    (lambda: PixelRange(ONE, 1.0), "high must be a torch.Tensor"),  # type: ignore[arg-type]
    (lambda: PixelRange(ONE, torch.ones(3)), r"high must have shape \(1,\)"),
    (lambda: PixelRange(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0])), "low must be below high everywhere"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_what_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()


#: Logits in another form.
FORMS: dict[str, Any] = {
    "tuple": lambda own, x: (own.net(x), x),
    "dict": lambda own, x: {"logits": own.net(x)},
    "flat": lambda own, x: own.net(x)[0],
}


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_logits_are_read_from_every_form_that_features_are(form: str) -> None:
    net, images = small_net(), photos()
    plain = generate_challenges(net, images, names=["pgd-2"], seed=1)["pgd-2"]
    wrapped = generate_challenges(Net(FORMS[form], net=net), images, names=["pgd-2"], seed=1)["pgd-2"]
    assert torch.equal(plain, wrapped)
    with pytest.raises(ValueError, match=r"must return logits of shape \(B, N\); it returned \(5,\)"):
        generate_challenges(Net(FORMS["flat"], net=net), images, names=["pgd-2"])


def test_an_attack_is_refused_where_no_gradient_reaches_the_images() -> None:
    class Cut(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return small(x.detach())

    small = small_net()
    for parameters in (True, False):
        small.requires_grad_(parameters)
        with pytest.raises(ValueError, match="model must pass gradients of its logits to the images"):
            generate_challenges(Cut(), photos(), names=["fgsm"])
    assert generate_challenges(Cut(), photos(), names=["noise"])
