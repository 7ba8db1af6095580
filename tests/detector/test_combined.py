import math

import numpy as np
import pytest
import torch
from scipy.stats import betabinom

from fastgrad import UncertaintyDetector
from fastgrad.detector.combined import DetectorModule, Part
from fastgrad.scores import Fitted, OneSided, TwoSided

RATES = (0.01, 0.05, 0.1, 0.2)


class Column(Fitted):
    """One column of the block ``x``, or NaN where it exceeds 99."""

    def forward(self, blocks):
        values = blocks["x"][:, self.options["index"]]
        return torch.where(values > 99, torch.nan, values)


class Same(Fitted):
    def forward(self, rows):
        return rows


def scores(count, rng, dependence):
    """Five scores of different shapes that share two causes."""
    loadings = dependence * np.random.default_rng(99).normal(size=(2, 5))
    z = rng.normal(size=(count, 2)) @ loadings + rng.normal(size=(count, 5))
    return np.stack(
        [z[:, 0], np.exp(z[:, 1] / 2), z[:, 2] ** 2, -np.exp(-z[:, 3]), np.maximum(z[:, 4], -0.5)], 1
    )


def fitted(calibration, combine="fisher"):
    parts = {
        f"score{index}": Part(
            Column(index=index), Same(), OneSided if index else TwoSided, 3.0 if index == 4 else 1.0
        )
        for index in range(5)
    }
    return DetectorModule.fit(parts, raw(parts, calibration), combine=combine, cap=20.0)


def raw(parts, calibration):
    return {name: part.score(part.rows({"x": torch.tensor(calibration)})) for name, part in parts.items()}


@pytest.mark.parametrize("combine", ["fisher", "harmonic"])
@pytest.mark.parametrize(("count", "draws"), [(50, 80), (160, 80), (1000, 30)])
def test_flagged_share_keeps_its_promise_and_its_power(count, draws, combine):
    """Over calibration sets the share of flagged clean samples follows a Beta law around the stated rate.

    What a score means is estimated from the same samples; each helps to judge itself through nine tenths of the others
    only, which costs some power where it rests on a handful of samples, and never the promise.
    """
    rng = np.random.default_rng(count)
    shares = np.empty((draws, len(RATES)))
    for draw in range(draws):
        dependence = (0, 0.5, 1.5)[draw % 3]
        found = fitted(scores(count, rng, dependence), combine)(
            {"x": torch.tensor(scores(2000, rng, dependence))}
        )
        shares[draw] = [(found > -math.log(rate)).double().mean() for rate in RATES]
    for rate, share in zip(RATES, shares.T, strict=True):
        spread = np.sqrt(rate * (1 - rate) * (1 / (count + 2) + 1 / 2000))
        error = 4 * spread / np.sqrt(draws)
        assert share.mean() < rate + error
        assert share.mean() > rate - error - 0.8 / count
        assert share.std() < 1.4 * spread


@pytest.mark.parametrize("combine", ["fisher", "harmonic"])
def test_evidence_explains_what_is_calibrated(combine):
    rng = np.random.default_rng(5)
    module = fitted(scores(200, rng, 0.5), combine)
    x = torch.tensor(scores(300, rng, 0.5))
    own = module.raw({"x": x})
    unreliability, evidence = module.explain({"x": x})
    assert torch.equal(unreliability, module({"x": x}))
    assert list(evidence) == [f"score{index}" for index in range(5)]
    assert all((own >= 0).all() for own in evidence.values())
    assert evidence["score4"].max() > 3
    # What the final score calibrates is the sum, or rises with every part of it.
    joined = module.joined(own)
    if combine == "fisher":
        torch.testing.assert_close(sum(evidence.values()), joined)
    # The first is two-sided: its highest value need not be its most unusual one.
    for index, (name, own) in list(enumerate(evidence.items()))[1:]:
        more = x.clone()
        more[:, index] = more[:, index].sort().values[-1] + 1
        changed = module.raw({"x": more})
        assert (module.explain({"x": more})[1][name] >= own).all()
        assert (module.joined(changed) >= joined).all()
    x[0, 2] = 100
    unreliability, evidence = module.explain({"x": x})
    assert unreliability[0] == evidence["score2"][0] == torch.inf
    assert torch.isfinite(evidence["score1"][0])


@pytest.mark.parametrize("count", [50, 160, 1000])
def test_detector_flags_what_it_says_for_any_number_of_calibration_inputs(count):
    """One draw each: flagged new samples against the beta-binomial law of a threshold from ``count`` scores."""
    rng = np.random.default_rng(count)

    def clean(size):
        h = rng.normal(size=(size, 8)) * np.exp(0.3 * rng.normal(size=(size, 1)))
        return {"features": h, "logits": h @ np.random.default_rng(1).normal(size=(8, 5))}

    X = clean(300 + count)
    detector = UncertaintyDetector().fit(X, held_out=np.arange(300 + count) >= 300)
    found = detector.decision_function(clean(4000))
    assert len(detector.module_.calibration_scores) == count
    for rate in RATES[1:]:
        k = rate * (count + 1)
        law = betabinom(4000, k, count + 1 - k)
        flagged = (found > detector.threshold(rate)).sum()
        assert law.ppf(1e-3) <= flagged <= law.ppf(1 - 1e-3)
    # The calibration's own scores are those of new samples.
    own = detector.module_.calibration_scores.numpy()
    assert abs((own > detector.threshold(0.2)).sum() - 0.2 * (count + 1)) <= 1.5


def test_a_score_that_fails_makes_its_samples_unreliable_and_no_others():
    rng = np.random.default_rng(0)
    module, new = fitted(scores(200, rng, 0.5)), torch.tensor(scores(6, rng, 0.5))
    expected = module({"x": new})
    for index in range(5):
        broken = new.clone()
        broken[2, index] = 100
        found = module({"x": broken})
        assert torch.isinf(found).tolist() == [False, False, True, False, False, False]
        assert torch.equal(found[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
        parts = module.parts({"x": broken})
        assert [name for name, values in parts.items() if torch.isinf(values[2])] == [f"score{index}"]


def test_clean_samples_that_a_score_fails_on_are_refused():
    calibration = scores(20, np.random.default_rng(0), 0.5)
    calibration[3, 2] = 100
    with pytest.raises(ValueError, match=r"these were NaN: \{'score2': 1\}"):
        fitted(calibration)


def test_small_calibration_sets_and_order():
    rng = np.random.default_rng(1)
    for count in (2, 3, 5, 11):
        found = fitted(scores(count, rng, 0.5))({"x": torch.tensor(scores(50, rng, 0.5))})
        assert torch.isfinite(found).all()
        assert (found >= 0).all()


def test_weight_and_relevance_belong_to_the_score():
    calibration = np.random.default_rng(2).normal(size=(400, 1))
    part = Part(Column(index=0), Same(), OneSided, weight=2.0, relevant=0.1)
    parts = {"only": part}
    module = DetectorModule.fit(parts, raw(parts, calibration), combine="fisher", cap=20.0)
    new = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    log_p = module.scores.only.meaning(new[0])
    torch.testing.assert_close(module.joined(new), 2 * (-log_p + math.log(0.1)).clamp(min=0))
    assert module.spec()["children"]["scores"]["children"]["only"]["options"] == {
        "weight": 2.0,
        "relevant": 0.1,
    }
