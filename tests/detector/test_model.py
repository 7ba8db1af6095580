import copy
import dataclasses
import hashlib
import math
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from onnx_needed import skip_without_onnx
from python_process import run_python
from sklearn.metrics import roc_auc_score
from torch import nn

import fastgrad
from fastgrad import TwoStageModel, UncertaintyDetector
from fastgrad.blocks import BLOCKS, Block, Features, Gradients, Image, View, register_block
from fastgrad.blocks.extraction import Extraction, arguments
from fastgrad.blocks.subject import watch
from fastgrad.challenges import challenge_cost
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.detector import fitting, storage

CLASSES = 4
ALL = ["logits", "features", "activations", "gradients", "view", "image"]


def small_network(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(24, CLASSES),
    )  # fmt: skip
    with torch.no_grad():
        network[-1].weight.mul_(20)
    return network


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")


def head_of(network, x):
    subject = watch(network, *arguments(x))
    return subject.head, subject.classes


def loader(count=200, seed=0, labels=True):
    x = images(count, seed)
    return [(part, torch.arange(len(part)) % CLASSES) if labels else part for part in x.split(50)]


@pytest.fixture(scope="module")
def fitted():
    # Labels that the network does not know, but h does: a correction is kept.
    network, x = small_network(), images(200)
    labels = (x[:, 0].mean((1, 2)) > 0.5).long() + 2 * (x[:, 1].mean((1, 2)) > 0.5).long()
    pairs = list(zip(x.split(50), labels.split(50), strict=True))
    return TwoStageModel(network, budget=math.inf).fit(pairs, correct=True, verbose=False)


def test_gives_a_named_tuple_and_leaves_the_network_alone(fitted):
    network = fitted.model
    before = copy.deepcopy(network.state_dict())
    assert network.training
    prediction = fitted(images(7, 5))
    assert prediction._fields == ("logits", "probabilities", "uncertainty", "risk")
    logits, probabilities, uncertainty, risk = prediction
    assert risk.shape == (7,)
    assert ((risk > 0) & (risk < 1)).all()
    assert logits.shape == probabilities.shape == (7, CLASSES)
    assert uncertainty.shape == (7,)
    assert uncertainty.dtype == torch.float32
    assert not uncertainty.requires_grad
    torch.testing.assert_close(probabilities.sum(1), torch.ones(7))
    with torch.no_grad():
        torch.testing.assert_close(logits, copy.deepcopy(network).eval()(images(7, 5)))
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_explains_what_a_call_gives(fitted, tmp_path):
    x = images(50, 9)
    x[25:] += 0.3 * torch.randn(x[25:].shape, generator=torch.Generator().manual_seed(1))
    prediction, evidence, raised = fitted.explain(x)
    for explained, called in zip(prediction, fitted(x), strict=True):
        assert torch.equal(explained, called)
    kept = fitted.report().kept
    assert list(evidence) == list(fitted.alarms) == list(raised) == [*kept, "challenges"]
    assert all(own.shape == (50,) and own.dtype == torch.float32 and (own >= 0).all() for own in evidence.values())
    # The uncertainty rises with the sum of all evidence.
    total = sum(own.double() for own in evidence.values())
    order = total.argsort()
    assert (prediction.uncertainty[order].diff() >= -1e-4).all()
    assert total[25:].mean() > 2 * total[:25].mean()
    # Without any of its evidence the risk would be less by so much.
    _, own, columns, kinds = fitted._predict(x)
    clean = torch.full_like(kinds, -torch.inf)
    clean[:, 0] = 0
    torch.testing.assert_close(
        raised["challenges"].double(),
        fitted.risk_(own, columns, kinds) - fitted.risk_(own, columns, clean),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    words = {name: BLOCKS[name].alarm for name in kept}
    assert {name: text for name, text in fitted.alarms.items() if name != "challenges"} == words
    # The classifier of challenges reads every block that was kept, and says which.
    seen = ", ".join(name.replace("_", " ") for name in kept)
    assert fitted.alarms["challenges"].endswith(f"trained on (seen in {seen})")
    loaded = TwoStageModel.load(fitted.save(tmp_path / "estimators.safetensors"), fitted.model)
    assert loaded.alarms == fitted.alarms
    assert all(torch.equal(own, evidence[name]) for name, own in loaded.explain(x).evidence.items())
    with pytest.raises(RuntimeError, match="fitted first"):
        TwoStageModel(fitted.model).explain(x)


def test_evidence_that_cannot_be_computed_is_infinite(fitted):
    prediction, evidence, _ = fitted.explain(torch.full((2, 3, 8, 8), torch.nan))
    assert (prediction.uncertainty == torch.inf).all()
    assert (prediction.risk == 1).all()
    assert (evidence["logits"] == torch.inf).all()


def test_noise_is_less_reliable_than_clean_images(fitted):
    clean = images(200, 9)
    noise = clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    scores = torch.cat([fitted(clean).uncertainty, fitted(noise).uncertainty])
    assert roc_auc_score(np.repeat([0, 1], 200), scores.numpy()) > 0.8


def test_threshold_and_calibration_scores(fitted):
    assert fitted.threshold(0.05) == pytest.approx(-np.log(0.05))
    scores = fitted.calibration_scores
    n = len(scores)
    # Above the threshold lie the highest calibration scores; interpolation and the tail move it by one rank.
    assert abs(int((scores > fitted.threshold(0.1)).sum()) - 0.1 * (n + 1)) <= 1.5
    with pytest.raises(ValueError, match="false_alarm_rate must lie in"):
        fitted.threshold(0)


def test_round_trip_is_bit_equal(fitted, tmp_path):
    path = fitted.save(tmp_path / "estimators.safetensors")
    loaded = TwoStageModel.load(path, fitted.model)
    x = images(9, 3)
    for saved, restored in zip(fitted(x), loaded(x), strict=True):
        assert torch.equal(saved, restored)
    assert loaded.threshold(0.1) == fitted.threshold(0.1)
    assert str(loaded.report()) == str(fitted.report())
    with pytest.raises(RuntimeError, match="features of the fit, which are not stored"):
        loaded.report(gains=True)
    assert torch.equal(loaded.calibration_scores, fitted.calibration_scores)
    again = loaded.save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("clip", [None, (0, 255)])
def test_a_file_has_the_normalisation_that_fit_was_told(tmp_path, clip):
    skip_without_onnx()
    mean, std = [0.2, 0.4, 0.5], [0.5, 1.0, 0.25]
    white = 1 if clip is None else clip[1]
    told = {"mean": [white * m for m in mean], "std": [white * s for s in std], "clip": clip}
    x = (images(60) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    two_stage = TwoStageModel(small_network(), blocks=["logits"]).fit([x], None, **told)
    two_stage = TwoStageModel.load(two_stage.save(tmp_path / "estimators.safetensors"), two_stage.model)
    for given, expected in (({}, (mean, std)), ({"mean": [0.0] * 3, "std": [1.0] * 3}, ([0.0] * 3, [1.0] * 3))):
        file = fastgrad.export(two_stage, x[:2], tmp_path / "model.onnx", **given)
        description = ModelPackage(file).description
        assert description.mean == pytest.approx(expected[0])
        assert description.std == pytest.approx(expected[1])


@pytest.mark.parametrize(("clip", "expected"), [(None, None), ((-1, 1), [[0.5] * 3, [0.5] * 3])])
def test_a_range_that_was_told_is_a_normalisation(clip, expected):
    two_stage = TwoStageModel(small_network(), blocks=["logits"]).fit([2 * images(60) - 1], None, clip=clip)
    assert two_stage.report().normalisation == expected


def test_a_new_process_knows_every_stored_part():
    code = (
        "import fastgrad; fastgrad.TwoStageModel; from fastgrad.scores.fitted import Fitted; "
        "assert {'Correction', 'Temperature', 'NoisyOr', 'Risk'} <= set(Fitted.kinds)"
    )
    run_python("-c", code)


def test_every_changed_byte_is_refused(fitted, tmp_path):
    data = bytearray(fitted.save(tmp_path / "estimators.safetensors").read_bytes())
    bad = tmp_path / "bad.safetensors"
    rng = np.random.default_rng(0)
    for place in [0, 7, 8, 40, 120, len(data) - 1, *rng.integers(0, len(data), 60).tolist()]:
        changed = data.copy()
        changed[place] ^= 1 << int(rng.integers(8))
        bad.write_bytes(changed)
        with pytest.raises(ValueError, match=r"not one|changed or damaged"):
            TwoStageModel.load(bad, fitted.model)
    for content in (b"", bytes(data[:-1]), bytes(data) + b"0", b"PK\x03\x04 not ours", bytes(data[: len(data) // 2])):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"not one|changed or damaged"):
            TwoStageModel.load(bad, fitted.model)


def test_foreign_files_and_networks_are_refused(fitted, tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "pickle.pt")
    for name in ("foreign.safetensors", "pickle.pt"):
        with pytest.raises(ValueError, match=r"written by TwoStageModel.save; .* is not one"):
            TwoStageModel.load(tmp_path / name, fitted.model)
    with pytest.raises(FileNotFoundError):
        TwoStageModel.load(tmp_path / "nothing", fitted.model)
    path = fitted.save(tmp_path / "estimators.safetensors")
    with pytest.raises(ValueError, match="its parameters differ"):
        TwoStageModel.load(path, small_network(1))


@pytest.mark.parametrize("block", ["gradients", "contrasts"])
def test_blocks_by_name_and_clean_data_alone(block):
    blocks = [block, "logits", "features", "image"]
    two_stage = TwoStageModel(small_network(), blocks=blocks)
    two_stage.fit(loader(120, labels=False), None)
    assert set(two_stage.detector_.sources) == set(blocks)
    assert two_stage(images(2)).risk is None
    prediction = two_stage(images(5))
    torch.testing.assert_close(prediction.probabilities, prediction.logits.softmax(-1))
    # One sample's result does not depend on its neighbours, beyond rounding.
    alone = torch.cat([two_stage(x).uncertainty for x in images(5).split(1)])
    torch.testing.assert_close(alone, prediction.uncertainty, rtol=1e-3, atol=1e-3)
    assert two_stage(images(5)[:0]).uncertainty.shape == (0,)


def test_a_network_that_draws_random_numbers_is_fitted_with_a_warning():
    noisy = nn.Sequential(small_network(), nn.Identity())
    noisy[1].forward = lambda z: z + torch.rand_like(z).mul(100)
    with pytest.warns(UserWarning, match="draws random numbers"):
        TwoStageModel(noisy, blocks=["logits"]).fit(loader(60, labels=False), None)


@pytest.mark.parametrize("write", [lambda x: x.mul_(0.7).sub_(0.1), lambda x: x.clamp_(0, 1)])
def test_what_a_network_writes_to_its_inputs_changes_nothing_of_a_fit(write):
    fits = []
    for change in (write, lambda x: write(x.clone())):
        network = nn.Sequential(nn.Identity(), small_network())
        network[0].forward = change
        with torch.no_grad():
            model = TwoStageModel(network, blocks=["logits", "image", "view"])
            fits.append(model.fit(loader(60), challenges_per_input=1))
    # Attacks are among them.
    assert fits[0].report().challenges == fits[1].report().challenges
    assert torch.equal(*(fit.calibration_scores for fit in fits))
    x = images(5)
    assert torch.equal(*(fit(x).uncertainty for fit in fits))
    assert torch.equal(x, images(5))


def test_a_price_is_measured_on_what_the_network_takes():
    """Ids that begin at 1 become others in each pass."""
    network = nn.Sequential(nn.Identity(), nn.Embedding(40, 4), nn.Flatten(), nn.Linear(20, CLASSES))
    network[0].forward = lambda ids: ids.sub_(1)
    ids = torch.randint(1, 41, (60, 5), generator=torch.Generator().manual_seed(0))
    assert TwoStageModel(network.eval(), budget=math.inf).fit([ids]).report().price.measured > 1


def test_a_network_that_bears_no_single_sample_is_not_fitted_without_attacks():
    def several(x):
        if len(x) == 1:
            raise RuntimeError("one alone")
        return x

    network = nn.Sequential(nn.Identity(), small_network())
    network[0].forward = several
    with pytest.raises(RuntimeError, match="one alone"):
        TwoStageModel(network, blocks=["logits"]).fit(loader(60))


def test_blocks_hold_what_they_say():
    network, x = small_network().eval(), images(4)
    logits, blocks = Extraction(network, [Gradients(), Features()], log=False)(x)
    features = network[:-1](x).detach()
    torch.testing.assert_close(blocks["features"], features)
    torch.testing.assert_close(logits, network(x).detach())
    names = [name for name, _ in network.named_parameters()]
    ones = fastgrad.target_sqnorm(features, logits, "ones", loss="bce", bias=False)
    torch.testing.assert_close(blocks["gradients"][:, 0, names.index("6.weight")], ones, rtol=1e-4, atol=0)


def test_a_file_of_another_format_is_refused(fitted, tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(storage, "FORMAT", 2)
        path = fitted.save(tmp_path / "later.safetensors")
    with pytest.raises(ValueError, match="has format 2; this version of fastgrad reads format 1"):
        TwoStageModel.load(path, fitted.model)


@pytest.mark.parametrize(
    "change", [(b'"data_offsets":[0,', b'"data_offsets":[1,'), (b"detector.final.", b"detector.other.")]
)
def test_a_file_made_to_look_whole_is_refused(fitted, tmp_path, change):
    """Anyone can write its digest, also of a file whose tensors are not what it says."""
    path = fitted.save(tmp_path / "m.safetensors")
    data = path.read_bytes()
    digest = re.search(rb'digest\W+"([0-9a-f]{64})', data)[1]
    data = data.replace(digest, storage._EMPTY.encode(), 1).replace(*change, 1)
    path.write_bytes(data.replace(storage._EMPTY.encode(), hashlib.sha256(data).hexdigest().encode(), 1))
    with pytest.raises(ValueError, match=r"path must be a file written by TwoStageModel\.save"):
        TwoStageModel.load(path, fitted.model)


def test_given_loaders_are_used():
    challenges = [(1 - x, [f"kind {i % 3}" for i in range(len(x))]) for x in images(90, 4).split(30)]
    two_stage = TwoStageModel(small_network(), blocks=["logits", "image"])
    two_stage.fit(loader(150), challenges, loader(100, 7))
    assert len(two_stage.calibration_scores) == 100  # all of the calibration loader
    assert two_stage.report().exact
    assert two_stage.detector_.scores.challenges.score.bias.shape == (4,)
    assert two_stage.report().challenges == {f"kind kind {i}": 30 for i in range(3)}
    # Each is read once, as the 250 clean inputs are.
    assert two_stage.report().passes == pytest.approx(1 + 90 / 250)
    for part in ("not measured, as the blocks were named", "100 clean inputs, held out, so rates are exact"):
        assert part in str(two_stage.report())


def test_a_bad_input_is_never_called_reliable(fitted):
    x = images(3)
    x[1, 0, 0, 0] = float("nan")
    uncertainty = fitted(x).uncertainty
    clean = fitted(images(3)).uncertainty
    assert uncertainty[1] == float("inf")
    torch.testing.assert_close(uncertainty[[0, 2]], clean[[0, 2]], rtol=1e-3, atol=1e-3)


def test_a_block_that_fails_makes_its_batch_unreliable_and_says_so(monkeypatch):
    two_stage = TwoStageModel(small_network(), blocks=["logits", "image"]).fit(loader(120), None)
    x = images(5)
    assert torch.isfinite(two_stage(x).uncertainty).all()

    def fail(self, found):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Image, "values", fail)
    with pytest.warns(RuntimeWarning, match="'image' failed on a batch, whose uncertainty is infinite: out of"):
        prediction = two_stage(x)
    assert (prediction.uncertainty == torch.inf).all()
    torch.testing.assert_close(prediction.logits, two_stage.model.eval()(x).detach())
    # While it is fitted, a failure is an error.
    with pytest.raises(RuntimeError, match="out of luck"):
        TwoStageModel(small_network(), blocks=["logits", "image"]).fit(loader(120), None)


def test_copies_and_pickles_score_alike(fitted):
    x = images(4)
    for twin in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert twin.model is not fitted.model
        assert torch.equal(twin(x).uncertainty, fitted(x).uncertainty)
        assert twin.extraction_.model is twin.model


def test_another_network_needs_another_fit(fitted):
    other = copy.deepcopy(fitted)
    other.model = small_network(1)
    with pytest.raises(RuntimeError, match="model must be the network that TwoStageModel was fitted with"):
        other(images(4))


def test_threads_share_one_module(fitted):
    inputs = [images(6, seed) for seed in range(4)] * 3
    expected = [fitted(x).uncertainty for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda x: fitted(x).uncertainty, inputs)
        assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


def test_the_gate_mixes_network_and_correction(fitted):
    x = torch.cat([images(20, 2), images(20, 3) * 4 - 1])
    answer = fitted(x)
    logits, blocks = fitted.extraction_(x)
    logits, h = fitted.temperature_(logits.double()), blocks["features"].double()
    g = torch.sigmoid(fitted.gate_.log_odds(fitted.detector_.explain(blocks)[1])).unsqueeze(1)
    second = (logits + h @ fitted.correction_.weight + fitted.correction_.bias).softmax(1)
    torch.testing.assert_close(
        answer.probabilities.double(), (1 - g) * logits.softmax(1) + g * second, rtol=1e-4, atol=1e-6
    )
    assert 0 < float(g.min()) < float(g.max()) < 1
    assert float((second - logits.softmax(1)).abs().max()) > 0.1


def test_a_correction_of_labels_that_say_nothing_is_not_kept():
    labels = torch.randint(0, CLASSES, (120,), generator=torch.Generator().manual_seed(0))
    model = TwoStageModel(small_network(), blocks=["logits"])
    with pytest.warns(UserWarning, match=r"no correction certainly answers better.*of 120 clean .* of 360 challenges"):
        model.fit([(images(120, 1), labels)], challenges_per_input=3, correct=True)
    assert [model.correction_, model.gate_, len(model.extraction_.blocks)] == [None, None, 1]
    said = str(model.report())
    assert "correction" in said
    assert "points); " in said
    x = images(9, 5)
    torch.testing.assert_close(model(x).probabilities, model.temperature_(model.extraction_(x)[0]).softmax(1))


def test_the_report_says_price_samples_and_promises(fitted):
    report = fitted.report()
    assert report.kept == ["logits", "activations", "image", "roughness", "view"]
    assert report.price.limit == math.inf
    assert report.price.measured > 1
    assert (report.drawn, report.seen, report.calibrating, report.exact) == (200, 200, 200, False)
    assert sum(report.challenges.values()) == 600
    # Challenges are read at the price of an answer, as clean inputs are.
    assert report.passes == pytest.approx(4 * report.price.predicted + challenge_cost(3) - 3)
    text = str(report)
    parts = ("logits, activations", "forward passes predicted", "200 of 200", "from 0.005 on", "of their challenges")
    parts += (" measured on batches of ", ", limit inf", "each scored by what was fitted without it")
    assert all(part in text for part in parts), text


def test_inputs_that_come_twice_are_one_source():
    x = images(60)
    twice = TwoStageModel(small_network(), blocks=["logits", "activations"]).fit([x[:40], x, x[40:]], None)
    # Both are scored by what was fitted on neither.
    scores = twice.calibration_scores
    torch.testing.assert_close(torch.cat([scores[:40], scores[100:]]), scores[40:100])
    assert (twice.report().drawn, twice.report().calibrating) == (120, 60)
    # Nothing is fitted on what calibrates, though it come among the clean inputs.
    split, apart = (
        TwoStageModel(small_network(), blocks=["logits", "activations"]).fit([clean], None, [x[:30]])
        for clean in (x, x[30:])
    )
    torch.testing.assert_close(split(x).uncertainty, apart(x).uncertainty)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_at_the_images_no_attack_is_among_the_challenges(mode):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            *body, self.head = small_network()
            self.body = nn.Sequential(*body)

        def forward(self, x):
            if x.requires_grad:
                warnings.warn("no autograd kernel was registered", stacklevel=1)  # as operations on integers do
            with mode():
                h = self.body(x)
            return self.head(h)

    report = TwoStageModel(Frozen(), blocks=["logits"]).fit(loader(80)).report()
    kinds = [name for name, kind in fastgrad.challenges.CHALLENGES.items() if not kind.passes]
    assert sorted(report.challenges) == sorted(kinds)
    assert report.passes == pytest.approx(4)


def test_gains_are_measured_on_demand(tmp_path):
    two_stage = TwoStageModel(small_network(), blocks=["logits", "image"]).fit(loader(80))
    report = two_stage.report(gains=True)
    assert set(report.gains) == {"logits", "image"}
    assert all(-1 < gain.auroc < 1 and 0 < gain.interval < 0.5 for gain in report.gains.values())
    # The network is random and challenges are pictures: what is seen of them is worth more.
    assert report.gains["image"].auroc > report.gains["logits"].auroc
    assert f"  image                {report.gains['image'].auroc:+.3f} +- " in str(report)
    loaded = TwoStageModel.load(two_stage.save(tmp_path / "model.safetensors"), two_stage.model)
    assert loaded.report().gains == report.gains
    plain = TwoStageModel(small_network(), blocks=["logits", "image"]).fit(loader(80), None)
    with pytest.raises(ValueError, match="at least two blocks and two families"):
        plain.report(gains=True)
    assert "without generated challenges that have labels: unusual inputs do not raise it" in str(plain.report())


def test_a_limit_binds():
    with pytest.warns(RuntimeWarning, match="the budget must be at least") as warned:
        two_stage = TwoStageModel(small_network(), budget=1.0).fit(loader(60), None)
    assert [warning.filename for warning in warned] == [__file__]
    assert two_stage.report().kept == ["logits"]
    assert [name for name, _ in two_stage.report().price.dropped][-3:] == ["roughness", "image", "activations"]
    assert [TwoStageModel(small_network(), budget=kind(2)).budget for kind in (np.float32, np.int64)] == [2, 2]


def test_asked_for_blocks_are_kept_whatever_they_cost():
    two_stage = TwoStageModel(small_network(), blocks=["logits", View(), "gradients"])
    two_stage.fit(loader(120, labels=False), None)
    assert two_stage.detector_.sources == two_stage.report().kept == ["logits", "view", "gradients"]
    assert torch.isfinite(two_stage(images(5)).uncertainty).all()


def test_a_fit_in_inference_mode_is_the_fit_outside():
    fits = []
    for inference in (False, True):
        model = small_network()
        with torch.inference_mode(inference), warnings.catch_warnings(action="ignore"):
            fits.append(TwoStageModel(model, blocks=["logits"]).fit(loader(60), correct=True))
    assert not any(value.is_inference() for value in fits[1].state_dict().values())
    torch.testing.assert_close(fits[1](images(5)), fits[0](images(5)), rtol=0, atol=0)


def test_one_seed_decides_all(tmp_path):
    def file(name, **options):
        two_stage = TwoStageModel(small_network(), blocks=["logits", "image"], **options).fit(loader(60))
        return two_stage.save(tmp_path / name).read_bytes()

    assert file("one") == file("two") != file("three", seed=1)


def test_a_detectors_own_seed_decides_what_is_held_out(monkeypatch):
    held_out, plain = [], fitting.collect.drawn_batches

    def watched(sample, verbose):
        held_out.append(sample.held_out.tolist())
        return plain(sample, verbose)

    monkeypatch.setattr(fitting.collect, "drawn_batches", watched)
    for seed, own in ((0, 3), (1, 3), (0, 4), (0, np.random.RandomState(3))):
        detector = UncertaintyDetector(log=False, calibration_fraction=0.5, random_state=own)
        TwoStageModel(small_network(), detector=detector, blocks=["logits"], seed=seed).fit(loader(60), None)
    assert held_out[0] == held_out[1] == held_out[3] != held_out[2]


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_evaluation_changes_are_left_as_they_were(fails):
    class Observer(nn.Module):
        """Keeps the range of what it sees, as a network to be quantized does; a first input makes room for it."""

        def __init__(self):
            super().__init__()
            self.register_buffer("highest", torch.empty(0))

        def forward(self, x):
            self.highest.resize_(1).copy_(x.detach().amax())
            if fails and x.requires_grad:
                raise InterruptedError
            return x

    network = nn.Sequential(Observer(), small_network())
    two_stage = TwoStageModel(network, blocks=["logits"])
    with pytest.raises(InterruptedError) if fails else nullcontext():
        two_stage.fit(loader())
    assert network[0].highest.shape == (0,)
    network.eval()(images(3))
    before = network[0].highest.clone()
    with pytest.raises(InterruptedError) if fails else nullcontext():
        two_stage.fit(loader())
    assert torch.equal(network[0].highest, before)


def test_what_the_user_passed_is_honoured_and_not_changed(tmp_path):
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


@dataclasses.dataclass
class Brightness(Block):
    """A block of the user's, which has no hash."""

    name = "brightness"
    shapes = "(B, 3)"

    def values(self, found):
        return found.image().mean((2, 3))

    @classmethod
    def scores(cls, blocks, settings):
        yield cls.distance(blocks, settings)


def test_a_block_of_the_users_goes_from_fit_to_file(tmp_path):
    two_stage = TwoStageModel(small_network(), blocks=["logits", Brightness()]).fit(loader(120))
    assert two_stage.detector_.sources == ["logits", "brightness", "challenges"]
    x = images(20, 9)
    usual, bright = (two_stage.explain(inputs).evidence["brightness"].mean() for inputs in (x, x + 1))
    assert bright > 4 * usual
    with pytest.raises(ValueError, match=r"use fastgrad\.blocks\.register_block; 'brightness' is not"):
        two_stage.save(tmp_path / "model.safetensors")
    register_block(Brightness)
    try:
        loaded = TwoStageModel.load(two_stage.save(tmp_path / "model.safetensors"), two_stage.model)
        assert torch.equal(loaded(x).risk, two_stage(x).risk)
        named = TwoStageModel(small_network(), blocks=["brightness"]).fit(loader(60), None)
        assert named.report().kept == ["brightness"]
    finally:
        del BLOCKS["brightness"]
    with pytest.raises(ValueError, match=r"must be registered \(register_block\); unknown: \['brightness'\]"):
        TwoStageModel.load(tmp_path / "model.safetensors", two_stage.model)
    skip_without_onnx()
    file = fastgrad.export(two_stage, x, tmp_path / "model.onnx", evidence=True, tolerance=1e-4)
    package = ModelPackage(file)
    assert package.description.risk
    assert list(package.description.evidence) == ["logits", "brightness", "challenges"]
    torch.testing.assert_close(package(x).risk, two_stage(x).risk, rtol=1e-4, atol=1e-4)


def test_labels_calibrate_the_probabilities():
    network = small_network()
    two_stage = TwoStageModel(network, blocks=["logits"]).fit(loader(400), None)
    logits, probabilities, _, risk = two_stage(images(50, 3))
    labels = torch.arange(50) % CLASSES

    def loss(p):
        return float(-p[torch.arange(50), labels].log().mean())

    # The labels are those of nobody's images: probabilities and risk learn to say so.
    assert loss(probabilities) < loss(logits.softmax(-1))
    assert torch.equal(probabilities.argmax(1), logits.argmax(1))
    assert 0.6 < float(risk.mean()) < 0.9


def test_the_last_layer_is_found():
    network = small_network()
    assert head_of(network, images(2)) == ("6", CLASSES)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.decoy = nn.Flatten(), nn.Linear(192, 3), nn.Linear(3, 3)

        def forward(self, x):
            logits = self.head(self.body(x))
            self.decoy(logits)
            return {"logits": logits}

    assert head_of(Wrapped(), images(2)) == ("head", 3)
    assert head_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Sigmoid()), images(2)) == (None, 3)


def test_a_compiled_network_is_the_one_that_was_compiled(tmp_path):
    plain, options = small_network(), {"blocks": ["logits", "activations", "features"]}
    one = TwoStageModel(plain, **options).fit(loader(60), None)
    other = TwoStageModel(torch.compile(plain, backend="eager"), **options).fit(loader(60), None)
    assert other.extraction_.known == one.extraction_.known
    torch.testing.assert_close(other(images(5)), one(images(5)), rtol=0, atol=0)
    other.save(tmp_path / "compiled")
    torch.testing.assert_close(TwoStageModel.load(tmp_path / "compiled", plain)(images(5)), one(images(5)))


def test_hugging_face_and_timm_classifiers_need_no_adapter():
    transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
        patch_size=4, num_labels=CLASSES,
    )  # fmt: skip
    vit = transformers.ViTForImageClassification(config)
    mixer = timm.create_model("resnet10t", num_classes=CLASSES)
    for network, head, size in ((vit, "classifier", 8), (mixer, "fc", 32)):
        data = [nn.functional.interpolate(x, size=(size, size)) for x in loader(60, labels=False)]
        two_stage = TwoStageModel(network, blocks=ALL).fit(data, None)
        assert two_stage.extraction_.known.head == head
        assert torch.isfinite(two_stage(data[0]).uncertainty).all()


def test_text_classifier_takes_a_mapping():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    network = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(0, 20, (60, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(20)]
    two_stage = TwoStageModel(network, budget=math.inf).fit(data, None)
    assert two_stage.report().kept == ["logits", "activations"]
    assert two_stage(data[0]).uncertainty.shape == (20,)
    assert two_stage(data[0]).risk is None
    labelled = [batch | {"labels": torch.arange(20) % 3} for batch in data]
    assert TwoStageModel(network, budget=math.inf).fit(labelled, None)(data[0]).risk is not None
    report = TwoStageModel(network, budget=math.inf).fit(data).report()
    assert set(report.challenges) == {"transposition", "substitution"}  # of inputs without padding


def test_a_fit_that_fails_at_last_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwoStageModel(small_network(), blocks=["logits"]).fit(loader(60), None)
    before = {name: getattr(model, name) for name in ("extraction_", "detector_", "temperature_", "risk_", "report_")}

    def fails(*_: object) -> None:
        raise RuntimeError("no risk")

    for last in ("_risk", "_report"):
        with monkeypatch.context() as patch:
            patch.setattr(fitting, last, fails)
            with pytest.raises(RuntimeError, match="no risk"):
                model.fit(loader(80), None)
        assert all(getattr(model, name) is value for name, value in before.items())


class Exact(nn.Module):
    """A network that autocast leaves as it is."""

    def __init__(self):
        super().__init__()
        self.network = small_network()
        # Of so many channels that their projection is held in float32.
        self.network[0], self.network[1], self.network[6] = (
            nn.Conv2d(3, 1100, 3, padding=1), nn.BatchNorm2d(1100), nn.Linear(4400, CLASSES),
        )  # fmt: skip

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.network(x)


def test_autocast_is_for_the_network_alone():
    network, x = Exact(), images(9, 5)
    blocks = ["logits", "activations", "image"]

    def fit():
        with warnings.catch_warnings(action="ignore"):
            return TwoStageModel(network, blocks=blocks).fit(loader(40), correct=True, verbose=False)

    plain = fit()
    with torch.autocast("cpu", torch.bfloat16):
        cast, answer = fit(), plain(x)
    for other in (answer, cast(x)):
        assert all(torch.equal(a, b) for a, b in zip(plain(x)[:3], other[:3], strict=True))
