"""What is drawn and read: uniformly, once, and refused before any challenge is made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import Net
from torch import Tensor, nn

from fastgrad import TwoStageModel, UncertaintyDetector
from fastgrad.challenges import CHALLENGES
from fastgrad.detector import loaders


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def pairs(x: Tensor, labels: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(len(x)) % 3 if labels is None else labels
    return list(zip(x.split(20), labels.split(20), strict=True))


def test_inputs_are_drawn_uniformly_from_the_whole_loader() -> None:
    # Sorted by class, as folders are: the first inputs are of one class.
    loader = [(torch.arange(50.0).view(50, 1) + 50 * i, torch.full((50,), i)) for i in range(10)]
    counts: Counter[int] = Counter()
    for seed in range(40):
        drawn = loaders.draw("clean", loader, 60, seed)
        assert (len(drawn.tags), drawn.seen) == (60, 500)
        values = torch.cat([x for x in drawn.batches if isinstance(x, Tensor)])[:, 0]
        assert values.tolist() == sorted(set(values.tolist()))  # in the loader's order, none twice
        assert drawn.tags == [int(value) // 50 for value in values]
        counts.update(drawn.tags)
    # 2,400 draws from ten classes: chi-squared with 9 degrees of freedom, its 99.9 % quantile.
    assert sum((counts[i] - 240) ** 2 / 240 for i in range(10)) < 27.9


def test_loader_is_read_once() -> None:
    def once() -> Any:
        for length in (5, 7, 5):
            yield {"input_ids": torch.full((4, length), length), "scale": 2.0}

    drawn = loaders.draw("clean", once(), 100, 0)
    assert len(drawn.tags) == drawn.seen == 12
    assert sorted(tuple(x["input_ids"].shape) for x in drawn.batches) == [(4, 7), (8, 5)]
    assert all(x["scale"] == 2.0 for x in drawn.batches)


def test_what_came_beside_a_batch_stays_beside_its_inputs() -> None:
    inputs = torch.arange(12.0).view(12, 1)
    for shape in ((), (1,), (2, 3)):
        loader = [{"x": part, "scale": torch.full(shape, float(i % 2))} for i, part in enumerate(inputs.split(4))]
        drawn = loaders.draw("clean", loader, 100, 0)
        assert [tuple(x["scale"].shape) for x in drawn.batches] == [shape] * 2
        found = {value: x["scale"].mean().item() for x in drawn.batches for value in x["x"].flatten().tolist()}
        assert found == {float(i): float(i // 4 % 2) for i in range(12)}


def test_inputs_keep_their_names() -> None:
    ids, types = torch.arange(12.0).view(12, 1), -torch.arange(12.0).view(12, 1)
    pairs = [{"ids": ids[:2], "types": types[:2]}, {"types": types[2:8], "ids": ids[2:8]}, {"types": types[8:]}]
    drawn = loaders.draw("clean", pairs, 100, 0)
    assert sorted(value for x in drawn.batches for value in x.get("ids", ids[:0]).flatten().tolist()) == list(range(8))
    assert all(value <= 0 for x in drawn.batches for value in x["types"].flatten().tolist())


@pytest.mark.parametrize("batch", [8, 120])
def test_every_kind_of_challenge_is_made(batch: int) -> None:
    """Kinds take turns over all inputs, not over those of a batch."""
    detector = UncertaintyDetector(log=False, calibration_fraction=1 / 6)
    model = TwoStageModel(network(), detector=detector, blocks=["logits"])
    features = model.read_features(images(240).split(batch))
    made, held_out = features.challenging, features.held_out
    assert (int(made.sum()), int(held_out.sum())) == (600, 40)
    assert set(features.kinds) - {""} == set(CHALLENGES)
    counts = torch.bincount(features.sources[made], minlength=240)
    assert torch.equal(features.sources[~made], torch.arange(240))
    assert torch.equal(counts, torch.where(held_out[~made], 0, 3))
    shown = features.sources[torch.tensor([kind == "brightness" for kind in features.kinds])]
    assert len(shown) > 10


CLEAN = images(60)
BAD: dict[str, tuple[Callable[[TwoStageModel], Any], str]] = {
    "empty": (lambda m: m.fit([]), "clean must hold at least one batch; it was empty"),
    "read already": (lambda m: m.fit(iter([])), "an iterator can be read once"),
    "few": (
        lambda m: m.fit([CLEAN[:19]]),
        "at least 20 inputs, with which a false-alarm rate of 0.05 is possible; it gave 19",
    ),
    "few to calibrate": (
        lambda m: m.fit([CLEAN], challenges=None, calibration=[CLEAN[:5]]),
        "calibration must give at least 20 inputs; it gave 5",
    ),
    "few different": (lambda m: m.fit([CLEAN[:19]] * 3), "at least 20 different inputs; it gave 19"),
    "calibration on itself": (
        lambda m: m.fit([CLEAN], challenges=None, calibration=[CLEAN[10:], CLEAN[:31]]),
        "20 different inputs that calibration does not give; it gave 0",
    ),
    "one class": (
        lambda m: m.fit(pairs(CLEAN, torch.zeros(60, dtype=torch.long))),
        "of at least two classes; all 60 were 0",
    ),
    "no class": (lambda m: m.fit(pairs(CLEAN, torch.arange(60) % 4)), "class indices from 0 to 2, or .* from 0 to 3"),
    "negative": (lambda m: m.fit(pairs(CLEAN, torch.arange(60) % 3 - 1)), "they went from -1 to 1"),
    "soft labels": (lambda m: m.fit(pairs(CLEAN, torch.rand(60, 3))), "they were of shape \\(3,\\) each"),
    "one-hot": (lambda m: m.fit(pairs(CLEAN, torch.eye(3).long().repeat(20, 1))), r"of shape \(3,\) each and int64"),
    "some labels": (lambda m: m.fit([*pairs(CLEAN[:40]), CLEAN[40:]]), "20 of 60 inputs had no label"),
    "other count": (lambda m: m.fit([(CLEAN, torch.arange(5))]), "a batch had 60 inputs and 5"),
    "risk": (lambda m: m.fit([CLEAN], risk=True), "risk=True needs at least 30 inputs with labels; there were 0"),
    "risk of one too few": (lambda m: m.fit(pairs(CLEAN[:29]), risk=True), "risk=True needs at least 30 .* were 29"),
    "correction of too few": (lambda m: m.fit(pairs(CLEAN[:29]), correct=True), "correct=True needs .* there were 29"),
    "correction without labels": (lambda m: m.fit([CLEAN], correct=True), "needs challenges='generate' .* no labels"),
    "correction without challenges": (
        lambda m: m.fit(pairs(CLEAN), challenges=None, correct=True),
        "correct=True needs challenges='generate' .* other challenges or none",
    ),
    "constant": (lambda m: m.fit([torch.ones(60, 3, 4, 4)]), "images that show something; every one was constant"),
    "infinite": (lambda m: m.fit([CLEAN / 0]), "finite images"),
    "range": (lambda m: m.fit([CLEAN * 255], clip=(0, 1)), "must lie in the range that clip, mean and std give"),
    "normalised": (lambda m: m.fit([CLEAN], mean=[0.5] * 3, std=[2.0] * 3), "must lie in the range"),
    "unit images among bytes": (
        lambda m: m.fit([CLEAN], clip=(0, 255)),
        r"range from black to white, here \[0, 255\]; they took 0\.0039 of it: give the clip=",
    ),
    "divided twice": (lambda m: m.fit([CLEAN / 255]), r"here \[0, 1\]; they took 0\.0039 of it"),
    "calibration out of range": (
        lambda m: m.fit([CLEAN], challenges=None, calibration=[CLEAN * 255], clip=(0, 1)),
        r"images must lie in the range that clip, mean and std give, \[0, 1\]",
    ),
    "mixed ranges": (lambda m: m.fit([CLEAN, 255 * CLEAN]), "images must share one range"),
    "word": (
        lambda m: m.fit([CLEAN], challenges="none"),
        "challenges must be 'generate', None or a loader; it was 'none'",
    ),
    "no images": (lambda m: m.fit([CLEAN.flatten(1)]), "from images .* or token ids"),
    "range of no images": (
        lambda m: m.fit([CLEAN.flatten(1)], challenges=None, clip=(0, 1)),
        "clip, mean and std need images",
    ),
    "empty challenges": (lambda m: m.fit([CLEAN], challenges=[]), "challenges must hold at least one batch"),
    "max_samples": (lambda m: m.fit([CLEAN], max_samples=3), "max_samples must be an integer of at least 20; it was 3"),
    "each": (lambda m: m.fit([CLEAN], challenges_per_input=0), "challenges_per_input must be an integer of at least 1"),
    "none generated": (
        lambda m: m.fit([CLEAN], challenges=None, challenges_per_input=2),
        "challenges_per_input needs challenges='generate'",
    ),
    "half": (lambda m: m.fit([CLEAN], challenges_per_input=1.5), "an integer of at least 1; it was 1.5"),  # type: ignore[arg-type]
    "no number": (lambda m: m.fit([CLEAN], max_samples="all"), "an integer of at least 20; it was 'all'"),  # type: ignore[arg-type]
    "labels as a batch": (
        lambda m: m.fit([CLEAN, torch.arange(60) % 3]),
        r"clean must give inputs of one number of dimensions; they had \[1, 4\]\. Labels stand beside",
    ),
    "challenges and kinds": (
        lambda m: m.fit([CLEAN], challenges=(CLEAN, torch.arange(60))),
        r"challenges must give inputs of one number of dimensions; they had \[1, 4\]",
    ),
    "one label a batch": (lambda m: m.fit([(CLEAN, 1)]), "a batch had 60 inputs and 1"),
    "one word a batch": (lambda m: m.fit([CLEAN], challenges=[(CLEAN[:5], "noise")]), "a batch had 5 inputs and 1"),
    "one mean": (lambda m: m.fit([CLEAN], mean=0.5, std=0.5), "mean must have 3 values, one per channel; it was 0.5"),  # type: ignore[arg-type]
    "no deviation": (lambda m: m.fit([CLEAN], mean=[0.5] * 3, std=[math.nan] * 3), "std must be finite"),
    "several labels": (lambda m: m.fit([(CLEAN, [[0], [1, 2]] * 30)]), "labels class indices from 0 to 2, .* object"),
    "three bounds": (lambda m: m.fit([CLEAN], clip=(0, 0.5, 1)), "clip must have 2 values, black and white"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_challenge_is_made(case: str) -> None:
    """The network runs at most once, to be watched, and without gradients."""
    asked: list[bool] = []
    model = network()
    model.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    fit, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fit(TwoStageModel(model, blocks=["logits"]))
    assert not any(asked)
    assert len(asked) <= 5


def test_what_the_network_can_take_is_no_mistake() -> None:
    """Inputs that lack a dimension, which the network adds; dark images, of which no challenges are made."""
    flat = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 48)), nn.Linear(48, 3)).eval()
    two_stage = TwoStageModel(flat, blocks=["logits"]).fit([images(30), images(30, 1).flatten(2)], challenges=None)
    assert two_stage(images(4)).uncertainty.isfinite().all()
    for challenges in (None, [CLEAN / 300]):
        TwoStageModel(network(), blocks=["logits"]).fit([CLEAN / 255], challenges=challenges, clip=(0, 1))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_network_without_an_answer_is_not_calibrated(value: float) -> None:
    def overflowing(net: Any, x: Tensor) -> Tensor:
        logits: Tensor = net.network(x)
        return logits.index_fill(1, torch.tensor(1), value).where(x[:, :1, 0, 0] > x[:, 1:2, 0, 0], logits)

    with pytest.raises(ValueError, match=r"clean .* an answer to; for \d+ it gave NaN or infinity"):
        TwoStageModel(Net(overflowing, network=network()), blocks=["image"]).fit(pairs(CLEAN), challenges=None)
    masked = nn.Sequential(network(), nn.Threshold(-0.15, -math.inf))
    with pytest.raises(ValueError, match=r"clean and calibration must give .* blocks are finite; \['logits'\]"):
        TwoStageModel(masked, blocks=["logits"]).fit([CLEAN])


def test_labels_of_the_calibration_count_for_the_risk() -> None:
    model = TwoStageModel(network(), blocks=["logits"]).fit(
        pairs(CLEAN[:25]), challenges=None, calibration=pairs(CLEAN[25:]), risk=True
    )
    assert "without generated challenges that have labels: unusual inputs do not raise it" in str(model.report())
    assert "from 60 clean inputs" in str(model.report())
    model.fit([CLEAN[:25]], challenges=None, calibration=pairs(CLEAN[25:]), risk=True)
    assert "from 35 clean inputs" in str(model.report())


def test_no_risk_without_labels() -> None:
    model = TwoStageModel(network(), blocks=["logits"]).fit([CLEAN], challenges=None)
    assert model(CLEAN).risk is None
    assert model.explain(CLEAN).raised is None
    assert "risk          none: no labels" in str(model.report())
    model = TwoStageModel(network(), blocks=["logits"]).fit(pairs(CLEAN), challenges=None, risk=False)
    assert model(CLEAN).risk is None
    assert "none: not asked for" in str(model.report())
    model = TwoStageModel(network(), blocks=["logits"]).fit(pairs(CLEAN[:29]), challenges=None)
    assert [model.risk_, model.temperature_] == [None, None]
    said = "none: 29 labelled clean inputs are too few; it needs 30"
    assert said in str(model.report())
    model = TwoStageModel(nn.Sequential(network(), nn.Linear(3, 1)), blocks=["logits"]).fit([CLEAN], challenges=None)
    assert "none: the network has one logit" in str(model.report())
