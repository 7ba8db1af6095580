"""A fit: what it takes from loaders, options and the user's detector, what it leaves as it was, and its report."""

import copy
import math
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from small_images import CLASSES, images, loader, small_network
from small_nets import Net
from torch import nn

from fastgrad import TwoStageModel, UncertaintyDetector
from fastgrad.blocks import BLOCKS, DEFAULT_BLOCKS, View
from fastgrad.challenges import challenge_cost
from fastgrad.checks import without_warnings


def test_given_loaders():
    challenges = [(1 - x, [f"kind {i % 3}" for i in range(len(x))]) for x in images(90, 4).split(30)]
    two_stage = TwoStageModel(small_network(), blocks=["logits", "image"])
    two_stage.fit(loader(150), challenges=challenges, calibration=loader(100, 7))
    assert len(two_stage.calibration_scores) == 100  # all of the calibration loader
    assert two_stage.report().exact
    assert two_stage.detector_.scores.challenges.score.bias.shape == (4,)
    assert two_stage.report().challenges == {f"kind kind {i}": 30 for i in range(3)}
    # Each is read once, as the 250 clean inputs are.
    assert two_stage.report().passes == pytest.approx(1 + 90 / 250)
    for part in "100 clean inputs, held out, so rates are exact":
        assert part in str(two_stage.report())


def test_inputs_may_be_given_all_at_once():
    """As tensors, arrays of another precision, or batches."""
    x, y = images(150), torch.arange(150) % CLASSES
    batches = list(zip(x.split(64), y.split(64), strict=True))
    forms = [((batches,), images(40, 3)), ((x, y), images(40, 3)), ((x.double().numpy(), y.tolist()), images(40, 3))]
    fits = [
        TwoStageModel(small_network(), blocks=["logits", "image"]).fit(*data, calibration=other)
        for data, other in forms
    ]
    for fit in fits:
        assert (fit.report(), fit.report().drawn) == (fits[0].report(), 190)
        assert torch.equal(fit(x[:9]).risk, fits[0](x[:9]).risk)
        assert torch.equal(fit(x[:9]).uncertainty, fits[0](x[:9]).uncertainty)
    without = TwoStageModel(small_network(), blocks=["logits"]).fit(x.numpy(), challenges=(1 - x).numpy())
    assert without(x[:9]).risk is None
    assert without.report().challenges == {"challenge": 150}


def test_a_mapping_of_tensors_is_no_loader():
    ids = torch.randint(2, 40, (80, 6), generator=torch.Generator().manual_seed(0))
    layers = nn.Sequential(nn.Embedding(40, 4), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    network = Net(lambda net, input_ids: net.layers(input_ids), layers=layers).eval()
    fits = [
        TwoStageModel(network).fit(data, labels)
        for data, labels in (
            ({"input_ids": ids}, torch.arange(80) % 4),
            ([{"input_ids": ids, "labels": torch.arange(80) % 4}], None),
        )
    ]
    x = {"input_ids": ids[:9]}
    assert torch.equal(*(fit(x).uncertainty for fit in fits))
    assert torch.equal(*(fit(x).risk for fit in fits))


def test_equal_inputs_are_one_source():
    x = images(60)
    twice = TwoStageModel(small_network(), blocks=["logits", "activations"]).fit([x[:40], x, x[40:]], challenges=None)
    # Both are scored by what was fitted on neither.
    scores = twice.calibration_scores
    torch.testing.assert_close(torch.cat([scores[:40], scores[100:]]), scores[40:100])
    assert (twice.report().drawn, twice.report().calibrating) == (120, 60)
    # Nothing is fitted on what calibrates, though it come among the clean inputs.
    flat, x = (
        nn.Sequential(nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(),
        x.flatten(1),
    )
    split, apart = (
        TwoStageModel(flat, blocks=["logits", "activations"]).fit([clean], challenges=None, calibration=[x[:30]])
        for clean in (x, x[30:])
    )
    torch.testing.assert_close(split(x).uncertainty, apart(x).uncertainty)


@pytest.mark.parametrize("blocks", [["gradients", "logits", "features", "image"], ["contrasts", "logits", View()]])
def test_named_blocks_on_clean_data_alone(blocks):
    two_stage = TwoStageModel(small_network(), blocks=blocks).fit(loader(120, labels=False), challenges=None)
    names = [getattr(block, "name", block) for block in blocks]
    assert two_stage.report().kept == names
    assert two_stage.detector_.evidence_names == sorted(names, key=list(BLOCKS).index)
    prediction = two_stage(images(5))
    assert prediction.risk is None
    torch.testing.assert_close(prediction.probabilities, prediction.logits.softmax(-1))
    # One sample's result does not depend on its neighbours, beyond rounding.
    alone = torch.cat([two_stage(x).uncertainty for x in images(5).split(1)])
    torch.testing.assert_close(alone, prediction.uncertainty, rtol=1e-3, atol=1e-3)
    assert two_stage(images(5)[:0]).uncertainty.shape == (0,)


def parts(two_stage):
    return {name: value for name, value in two_stage.state_dict().items() if not name.startswith("model.")}


def test_a_fit_is_always_the_same():
    """Nothing is timed: beside a busy process each fit gives the same bits, whatever other fits gave."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        fits = [TwoStageModel(small_network()).fit(loader(120)) for _ in range(2)]
    finally:
        busy.kill()
        busy.wait()
    first, second = map(parts, fits)
    assert fits[0].report() == fits[1].report()
    assert fits[0].report().kept == list(DEFAULT_BLOCKS)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("text", [False, True])
def test_batches_of_other_sizes_give_the_same_parts(text):
    x = torch.randint(2, 40, (80, 6), generator=torch.Generator().manual_seed(0)) if text else images(80)
    layers = nn.Sequential(nn.Embedding(40, 4), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    network, labels = layers if text else small_network(), torch.arange(80) % 4
    first, *others = (
        TwoStageModel(network).fit(list(zip(x.split(size), labels.split(size), strict=True))) for size in (2, 8, 64)
    )
    for model in others:
        assert model.report() == first.report()
        assert all(torch.equal(value, parts(first)[name]) for name, value in parts(model).items())


def test_seed(tmp_path):
    def file(name, **options):
        two_stage = TwoStageModel(small_network(), blocks=["logits", "image"], **options).fit(loader(60))
        return two_stage.save(tmp_path / name).read_bytes()

    assert file("one") == file("two") != file("three", seed=1)


def test_seed_of_the_detector():
    held_out = []
    for seed, own in ((0, 3), (1, 3), (0, 4), (0, np.random.RandomState(3))):
        detector = UncertaintyDetector(log=False, calibration_fraction=0.5, random_state=own)
        model = TwoStageModel(small_network(), detector=detector, blocks=["logits"], seed=seed)
        held_out.append(model.read_features(loader(60), challenges=None).held_out.tolist())
    assert held_out[0] == held_out[1] == held_out[3] != held_out[2]


def test_detector_of_the_user(tmp_path):
    detector = UncertaintyDetector(log=False, folds=3, calibration_fraction=0.5, false_alarm_rate=0.1)
    before = detector.get_params()
    two_stage = TwoStageModel(small_network(), detector=detector, blocks=["logits", "image"]).fit(loader(80))
    assert detector.get_params() == before
    assert not hasattr(detector, "module_")
    assert len(two_stage.calibration_scores) == 40
    # What is held out has no challenges.
    assert sum(two_stage.report().challenges.values()) == 120
    assert two_stage.threshold() == pytest.approx(-math.log(0.1))
    stored = two_stage.save(tmp_path / "model.safetensors")
    assert TwoStageModel.load(stored, two_stage.model).threshold() == two_stage.threshold()
    detector.fit({"logits": torch.randn(60, CLASSES)})
    own = copy.deepcopy(detector.module_.state_dict())
    TwoStageModel(small_network(), detector=detector).half()
    assert all(detector.module_.state_dict()[name].dtype == value.dtype for name, value in own.items())


def test_inference_mode():
    fits = []
    for inference in (False, True):
        model = small_network()
        with torch.inference_mode(inference), without_warnings():
            fits.append(TwoStageModel(model, blocks=["logits"]).fit(loader(60), correct=True))
    assert not any(value.is_inference() for value in fits[1].state_dict().values())
    torch.testing.assert_close(fits[1](images(5)), fits[0](images(5)), rtol=0, atol=0)


def observing(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Keeps the range of what it sees, as a network to be quantized does; a first input makes room for it."""
    net.highest.resize_(1).copy_(x.detach().amax())
    if net.fails and x.requires_grad:
        raise InterruptedError
    return net.network(x)


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_are_left_as_they_were(fails):
    network = Net(observing, network=small_network(), highest=nn.Buffer(torch.empty(0)), fails=fails)
    for shape in (0,), (1,):
        before = network.highest.clone()
        assert before.shape == shape
        with pytest.raises(InterruptedError) if fails else nullcontext():
            TwoStageModel(network, blocks=["logits"]).fit(loader())
        assert torch.equal(network.highest, before)
        network.eval()(images(3))


def test_a_fit_that_fails_changes_nothing():
    model = TwoStageModel(small_network(), blocks=["logits"]).fit(loader(60), challenges=None)
    before = dict(vars(model)) | dict(model._modules)
    with pytest.raises(ValueError, match="challenges must give inputs that the network has an answer to"):
        model.fit(loader(80), challenges=images(30) * torch.nan)
    few = model.read_features(loader(80), challenges=None).at(torch.arange(2))
    with pytest.raises(ValueError, match="2 clean samples"):
        model.fit_features(few)
    assert all(value is before[name] for name, value in (vars(model) | model._modules).items())


def test_price_samples_and_promises(fitted):
    report = fitted.report()
    assert report.kept == ["logits", "activations", "image", "roughness", "view"]
    assert (report.drawn, report.seen, report.calibrating, report.exact) == (200, 200, 200, False)
    assert sum(report.challenges.values()) == 600
    # Challenges are read at the price of an answer, as clean inputs are.
    assert report.passes == pytest.approx(4 * report.predicted + challenge_cost(3) - 3)
    text = str(report)
    parts = ("logits, activations", "2 forward passes predicted", "200 of 200", "from 0.005 on", "of their challenges")
    parts += ("1 of them for view", "each scored by what was fitted without it")
    assert all(part in text for part in parts), text


def test_correction_that_is_not_kept():
    labels = torch.randint(0, CLASSES, (120,), generator=torch.Generator().manual_seed(0))
    model = TwoStageModel(small_network(), blocks=["logits"])
    with pytest.warns(UserWarning, match=r"no correction certainly answers better.*of 120 clean .* of 360 challenges"):
        model.fit([(images(120, 1), labels)], challenges_per_input=3, correct=True)
    assert [model.correction_, model.gate_, len(model.extraction_.blocks)] == [None, None, 1]
    said = str(model.report())
    assert "correction    not kept: " in said
    assert "points); " in said
    x = images(9, 5)
    torch.testing.assert_close(model(x).probabilities, model.temperature_(model.extraction_(x)[0]).softmax(1))


@pytest.mark.parametrize(("clip", "expected"), [(None, None), ((-1, 1), [[0.5] * 3, [0.5] * 3])])
def test_range_is_a_normalisation(clip, expected):
    two_stage = TwoStageModel(small_network(), blocks=["logits"]).fit([2 * images(60) - 1], challenges=None, clip=clip)
    assert two_stage.report().normalisation == expected
