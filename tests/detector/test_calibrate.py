"""Every clean sample is scored by what was fitted without it and its source, and rates are what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import betabinom

from fastgrad import TwoStageModel, UncertaintyDetector
from fastgrad.blocks import BLOCKS, Block, Features
from fastgrad.detector.calibrate import DetectorModule, assign_folds, calibrate, fit_scores, values_of
from fastgrad.detector.inputs import held_out_of
from fastgrad.scores.fitted import Fitted
from fastgrad.scores.one_class import distance

LOGITS = np.random.default_rng(1).normal(size=(8, 5))
WIDE = np.random.default_rng(2).normal(size=(8, 40))
RATES = (0.05, 0.1, 0.2)


def clean(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    h = rng.normal(size=(count, 8)) * np.exp(0.3 * rng.normal(size=(count, 1)))
    return {"logits": h @ LOGITS, "activations": h @ WIDE + rng.normal(size=(count, 40))}


def challenged(rng: np.random.Generator, count: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Clean samples and one challenge of each, their kinds (0 is clean) and sources."""
    own = clean(rng, count)
    kinds = np.concatenate([np.zeros(count, int), 1 + np.arange(count) % 4])
    other = {name: value + 0.5 * kinds[count:, None] for name, value in own.items()}
    X = {name: np.concatenate([own[name], other[name]]) for name in own}
    return X, kinds, np.tile(np.arange(count), 2)


def fitted(rng: np.random.Generator, count: int, **options: object) -> UncertaintyDetector:
    X, kinds, sources = challenged(rng, count)
    return UncertaintyDetector(log=False, **options).fit(X, (kinds > 0).astype(int), kinds=kinds, sources=sources)


def of(sources: np.ndarray, kinds: np.ndarray, held_out: np.ndarray | None = None) -> Features:
    """Features of these sources and kinds, 0 for clean, without a block."""
    return Features.of(
        torch.empty(len(sources), 0), {}, kinds=["" if kind == 0 else str(kind) for kind in kinds],
        sources=torch.from_numpy(sources), held_out=None if held_out is None else torch.from_numpy(held_out),
    )  # fmt: skip


@pytest.mark.parametrize("count", [4, 7, 50])
def test_a_source_is_in_one_fold(count: int) -> None:
    rng = np.random.default_rng(count)
    # Three challenges of each clean sample, in any order, and some of other sources.
    sources = np.concatenate([np.arange(count), np.repeat(np.arange(count), 3), count + np.arange(5)])
    kinds = (np.arange(len(sources)) >= count).astype(int)
    order = rng.permutation(len(sources))
    sources, kinds = sources[order], kinds[order]
    fold = assign_folds(of(sources, kinds), 5, np.random.RandomState(0)).numpy()
    assert set(fold) == set(range(min(5, count)))
    for source in range(count):
        assert len(set(fold[sources == source])) == 1
    sizes = np.bincount(fold[kinds == 0])
    assert sizes.max() - sizes.min() <= 1
    # What is held out is in no fold, nor are the challenges made from it.
    held_out = (sources < 2) & (kinds == 0)
    apart = assign_folds(of(sources, kinds, held_out), 5, np.random.RandomState(0)).numpy()
    assert ((apart == -1) == (sources < 2)).all()


def test_a_fit_sees_nothing_but_what_was_chosen() -> None:
    """Other rows may hold anything; `assign_folds` says what is chosen for which fit."""
    X, kinds, sources = challenged(np.random.default_rng(0), 40)
    blocks = {name: torch.from_numpy(value) for name, value in X.items()}
    chosen = torch.from_numpy(sources >= 10)
    found = []
    for other in (1.0, torch.nan):
        changed = {name: torch.where(chosen.unsqueeze(1), value, other) for name, value in blocks.items()}
        features = Features.of(changed["logits"], changed, kinds=[f"{kind or ''}" for kind in kinds])
        scores = fit_scores(features, chosen, BLOCKS, 30, log=False)
        found.append([value for score in scores.values() for value in score.state_dict().values()])
    assert len(found[0]) > 10
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("count", [1, 4])
def test_challenges_of_one_fold_alone_are_refused(count: int) -> None:
    y = np.arange(64) >= 60
    y[60 + count :] = False
    with pytest.raises(ValueError, match=rf"challenges must come from more sources, .*; the {count} left none"):
        UncertaintyDetector(log=False).fit(
            clean(np.random.default_rng(0), 64), y.astype(int), sources=np.where(y, 99, -1)
        )


def test_sources_may_have_any_number() -> None:
    X, sources = clean(np.random.default_rng(0), 60), np.arange(60) // 2
    expected, found = (UncertaintyDetector(log=False).fit(X, sources=g) for g in (sources, 2**63 - 100 + sources))
    np.testing.assert_array_equal(found.decision_function(X), expected.decision_function(X))


def shares(count: int, fits: int, new: int = 200, **options: object) -> np.ndarray:
    """The flagged share of new clean samples, ``(fits, rates)``."""
    found = np.empty((fits, len(RATES)))
    for number in range(fits):
        rng = np.random.default_rng([count, number])
        detector = fitted(rng, count, random_state=number, **options)
        scores = detector.decision_function(clean(rng, new))
        found[number] = [(scores > detector.threshold(rate)).mean() for rate in RATES]
    return found


def spread(rate: float, calibrating: int, new: int = 200) -> float:
    """Of the flagged share of new samples over fits, whose counts follow a beta-binomial law."""
    k = rate * (calibrating + 1)
    return float(betabinom(new, k, calibrating + 1 - k).std()) / new


def check_exact(found: np.ndarray, calibrating: int) -> None:
    """The mean over fits lies within the interval of the law."""
    for rate, share in zip(RATES, found.T, strict=True):
        assert abs(share.mean() - rate) < 3.3 * spread(rate, calibrating) / math.sqrt(len(share))
        assert share.std() < 1.35 * spread(rate, calibrating)


def check_folds(found: np.ndarray, count: int) -> None:
    """As if all samples had calibrated, or fewer flagged: more inputs to fit on make a clean one less unusual."""
    for rate, share in zip(RATES, found.T, strict=True):
        error = 3.3 * 1.35 * spread(rate, count) / math.sqrt(len(share))
        assert share.mean() < rate + error
        assert share.mean() > 0.6 * rate - error


def check_default(found: np.ndarray, count: int) -> None:
    """By default a thousand samples hold 200 out."""
    if count == 1000:
        check_exact(found, 200)
    else:
        check_folds(found, count)


@pytest.mark.parametrize(("count", "fits"), [(50, 20), (160, 12)])
def test_flagged_share_of_folds(count: int, fits: int) -> None:
    check_folds(shares(count, fits, folds=5), count)


def test_flagged_share_of_a_split() -> None:
    check_exact(shares(160, 25, calibration_fraction=0.4, folds=2), 64)


@pytest.mark.slow
@pytest.mark.parametrize("count", [50, 160, 1000])
def test_the_flagged_share_over_200_fits(count: int) -> None:
    check_default(shares(count, 200), count)


@pytest.mark.parametrize(
    ("count", "fits"), [(50, 10), *(pytest.param(count, 200, marks=pytest.mark.slow) for count in (50, 160, 1000))]
)
def test_the_flagged_share_of_a_fitted_model(count: int, fits: int) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)).eval()
    found = np.empty((fits, len(RATES)))
    for number in range(fits):
        generator = torch.Generator().manual_seed(1000 * count + number)
        own, odd, new = torch.randn(3, max(count, 200), 8, generator=generator)
        model = TwoStageModel(network, blocks=["logits", "activations"], seed=number)
        model.fit(own[:count].split(50), challenges=(2 * odd[:count]).split(50), verbose=False)
        uncertainty = model(new[:200]).uncertainty.numpy()
        found[number] = [(uncertainty > model.threshold(rate)).mean() for rate in RATES]
    check_default(found, count)


def test_a_thousand_samples_hold_a_part_out() -> None:
    X = {name: value[:, :3] for name, value in clean(np.random.default_rng(0), 1000).items()}
    detector = UncertaintyDetector(log=False).fit(X)
    assert len(detector.module_.calibration_scores) == 200
    assert detector.module_.options["exact"]
    detector.fit({name: value[:999] for name, value in X.items()})
    assert len(detector.module_.calibration_scores) == 999
    assert not detector.module_.options["exact"]
    assert len(detector.set_params(calibration_fraction=0.4).fit(X).module_.calibration_scores) == 400


@pytest.mark.parametrize("each", [4, 20])
def test_one_sample_of_a_source_calibrates(each: int) -> None:
    """One sample in five would leave almost no source to fit on, and samples of one source repeat what it says."""
    sources = np.random.default_rng(0).permutation(np.arange(1000) // each)
    own = sources[held_out_of(None, np.zeros(1000, bool), sources, 0.2, np.random.RandomState(0))]
    assert len(own) == len(set(own)) == 200 // each
    X = clean(np.random.default_rng(0), 1000)
    detector = UncertaintyDetector(log=False, calibration_fraction=0.2, folds=2).fit(X, sources=sources)
    assert len(detector.module_.calibration_scores) == 200 // each
    # By default it takes 1,000 sources for a split.
    assert not UncertaintyDetector(log=False).fit(X, sources=sources).module_.options["exact"]


def test_flagged_share_of_a_split_by_sources() -> None:
    found = np.empty((60, len(RATES)))
    for number in range(len(found)):
        rng = np.random.default_rng(number)
        X = {name: np.repeat(value, 20, 0) for name, value in clean(rng, 50).items()}
        X = {name: value + 0.05 * rng.normal(size=value.shape) for name, value in X.items()}
        detector = UncertaintyDetector(log=False, calibration_fraction=0.4, folds=2, random_state=number)
        scores = detector.fit(X, sources=np.arange(1000) // 20).decision_function(clean(rng, 200))
        found[number] = [(scores > detector.threshold(rate)).mean() for rate in RATES]
    check_exact(found, 20)


def test_a_rate_that_cannot_be_promised_warns() -> None:
    detector = fitted(np.random.default_rng(0), 50, folds=2)
    with pytest.warns(
        RuntimeWarning, match=r"false_alarm_rate=0.001 is below what 50 calibration inputs can promise, 0.02"
    ):
        assert detector.threshold(0.001) == pytest.approx(-math.log(0.001))
    assert detector.threshold(0.02) == pytest.approx(-math.log(0.02))


def test_repeated_sources_promise_no_rate() -> None:
    rng = np.random.default_rng(0)
    X = {name: np.repeat(value, 20, 0) for name, value in clean(rng, 50).items()}
    sources = np.arange(1000) // 20
    for held_out in (None, sources < 20):
        detector = UncertaintyDetector(log=False, folds=2).fit(X, sources=sources, held_out=held_out)
        least = 1 / (51 if held_out is None else 21)
        with pytest.warns(RuntimeWarning, match="extrapolated"):
            detector.threshold(0.99 * least)
        assert detector.threshold(least) == pytest.approx(-math.log(least))


def module() -> tuple[DetectorModule, dict[str, torch.Tensor]]:
    rng = np.random.default_rng(3)
    new = {name: torch.tensor(value) for name, value in clean(rng, 30).items()}
    return fitted(rng, 100, folds=2).to_module(), new


def test_evidence_is_a_weighted_sum() -> None:
    detector, new = module()
    raw, _ = values_of(detector.scores, new)
    uncertainty, evidence, _ = detector.explain(new)
    assert detector.evidence_names == ["logits", "activations", "challenges"]
    by_hand = dict.fromkeys(detector.evidence_names, torch.zeros(30, dtype=torch.float64))
    for score, log_p in zip(detector.scores, detector.p_values(raw), strict=True):
        options = score.options
        by_hand[options["evidence"]] = by_hand[options["evidence"]] + options["weight"] * (-log_p).clamp(0, 20)
    for source, own in zip(detector.evidence_names, evidence.T, strict=True):
        torch.testing.assert_close(own, by_hand[source])
    torch.testing.assert_close(uncertainty, -detector.final(sum(by_hand.values()).unsqueeze(0)).squeeze(0))
    assert [score.options["weight"] for score in detector.scores] == [1.0, 1.0, 1.0, 3.0]
    assert detector.p_values.two_sided.tolist() == [0]


def test_failed_score_makes_its_sample_unreliable() -> None:
    detector, new = module()
    expected = detector(new)
    new["activations"][2, 7] = torch.nan
    found = detector(new)
    assert torch.isinf(found).nonzero().flatten().tolist() == [2]
    kept = torch.arange(30) != 2
    torch.testing.assert_close(found[kept], expected[kept])


class NoNumber(Fitted):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, 0] * torch.nan


class Nameless(Block):
    name = "nameless"
    scores = (lambda *given: (*distance(*given)[:2], NoNumber()),)


def test_clean_samples_that_a_score_fails_on_are_refused() -> None:
    features = Features.of(torch.empty(40, 0), {"nameless": torch.randn(40, 3)})
    with pytest.raises(ValueError, match=r"these were NaN: \{'nameless_distance': 40\}"):
        calibrate(features, {"nameless": Nameless}, 5, np.random.RandomState(0), log=False)


def test_few_samples_are_enough_to_score() -> None:
    for count in (4, 5, 11):
        detector = UncertaintyDetector(log=False).fit(clean(np.random.default_rng(count), count))
        found = detector.decision_function(clean(np.random.default_rng(9), 50))
        assert np.isfinite(found).all()
        assert (found >= 0).all()
