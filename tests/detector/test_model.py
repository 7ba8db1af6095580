"""A call of a fitted model: what it answers, explains and leaves alone."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small_images import CLASSES, images, loader, small_network

from fastgrad import TwoStageModel
from fastgrad.blocks import BLOCKS, Image


def test_prediction_and_network_left_alone(fitted):
    network = fitted.model
    before = copy.deepcopy(network.state_dict())
    assert network.training
    prediction = fitted(images(7, 5))
    assert prediction._fields == ("logits", "probabilities", "uncertainty", "risk", "flagged")
    logits, probabilities, uncertainty, risk, flagged = prediction
    assert torch.equal(flagged, uncertainty > fitted.threshold())
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


def test_explanation(fitted):
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


@pytest.mark.parametrize("place", [(1,), (1, 0, 0, 0)], ids=["image", "pixel"])
def test_nan_beside_other_inputs(fitted, place):
    x = images(3)
    x[place] = torch.nan
    prediction, evidence, _ = fitted.explain(x)
    assert prediction.uncertainty[1] == evidence["logits"][1] == torch.inf
    assert prediction.risk[1] == 1
    clean = fitted(images(3)).uncertainty
    torch.testing.assert_close(prediction.uncertainty[[0, 2]], clean[[0, 2]], rtol=1e-3, atol=1e-3)


class Failing(Image):
    name = "failing"
    fails = False

    def values(self, forward):
        if self.fails:
            raise RuntimeError("out of luck")
        return super().values(forward)


def test_block_that_fails():
    block = Failing()
    two_stage = TwoStageModel(small_network(), blocks=["logits", block]).fit(loader(120), challenges=None)
    x = images(5)
    block.fails = True
    with pytest.warns(RuntimeWarning, match="'failing' failed on a batch, whose uncertainty is infinite: out of"):
        prediction = two_stage(x)
    assert (prediction.uncertainty == torch.inf).all()
    torch.testing.assert_close(prediction.logits, two_stage.model.eval()(x).detach())
    # While it is fitted, a failure is an error.
    with pytest.raises(RuntimeError, match="out of luck"):
        TwoStageModel(small_network(), blocks=["logits", block]).fit(loader(120), challenges=None)


def test_false_alarm_rate_is_set_and_stored(fitted, tmp_path):
    assert fitted.false_alarm_rate == 0.05
    loaded = TwoStageModel.load(fitted.save(tmp_path / "model.safetensors"), fitted.model)
    loaded.false_alarm_rate = 0.3
    x = images(100, 6)
    answer = loaded(x)
    assert torch.equal(answer.flagged, answer.uncertainty > -np.log(0.3))
    assert answer.flagged.sum() > fitted(x).flagged.sum()
    assert loaded.threshold() == pytest.approx(-np.log(0.3))
    again = TwoStageModel.load(loaded.save(tmp_path / "again.safetensors"), fitted.model)
    assert again.false_alarm_rate == 0.3
    with pytest.raises(ValueError, match="false_alarm_rate must lie in"):
        loaded.false_alarm_rate = 1.0
    with pytest.raises(RuntimeError, match="must be fitted first"):
        TwoStageModel(small_network()).false_alarm_rate = 0.1


def test_threshold_and_calibration_scores(fitted):
    assert fitted.threshold(0.05) == pytest.approx(-np.log(0.05))
    scores = fitted.calibration_scores
    n = len(scores)
    # Above the threshold lie the highest calibration scores; interpolation and the tail move it by one rank.
    assert abs(int((scores > fitted.threshold(0.1)).sum()) - 0.1 * (n + 1)) <= 1.5
    with pytest.raises(ValueError, match="false_alarm_rate must lie in"):
        fitted.threshold(0)


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


def test_labels_calibrate_the_probabilities():
    network = small_network()
    two_stage = TwoStageModel(network, blocks=["logits"]).fit(loader(400), challenges=None)
    logits, probabilities, _, risk, _ = two_stage(images(50, 3))
    labels = torch.arange(50) % CLASSES

    def loss(p):
        return float(-p[torch.arange(50), labels].log().mean())

    # The labels are those of nobody's images: probabilities and risk learn to say so.
    assert loss(probabilities) < loss(logits.softmax(-1))
    assert torch.equal(probabilities.argmax(1), logits.argmax(1))
    assert 0.6 < float(risk.mean()) < 0.9


def test_threads_share_one_module(fitted):
    inputs = [images(6, seed) for seed in range(4)] * 3
    expected = [fitted(x).uncertainty for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda x: fitted(x).uncertainty, inputs)
        assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


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
