"""Every clean sample calibrates, scored by what was fitted without it and without the challenges made from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgrad import UncertaintyDetector
from fastgrad.blocks import Features
from fastgrad.blocks.block import Settings
from fastgrad.detector.inputs import deal
from fastgrad.detector.supervised import fit_perceptrons, views

RATES = (0.05, 0.1, 0.2)
LOGITS = np.random.default_rng(1).normal(size=(8, 5))
WIDE = np.random.default_rng(2).normal(size=(8, 40))


def clean(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    h = rng.normal(size=(count, 8)) * np.exp(0.3 * rng.normal(size=(count, 1)))
    return {
        "features": h,
        "logits": h @ LOGITS,
        "activations": h @ WIDE + rng.normal(size=(count, 40)),
    }


@pytest.mark.parametrize("count", [4, 7, 50])
def test_every_clean_sample_is_scored_once_by_a_fit_without_its_group(count: int) -> None:
    rng = np.random.default_rng(count)
    # Three challenges of each clean sample, in any order, and some of none.
    groups = np.concatenate([np.arange(count), np.repeat(np.arange(count), 3), np.full(5, -1)])
    challenging = np.arange(len(groups)) >= count
    order = rng.permutation(len(groups))
    groups, challenging = groups[order], challenging[order]
    kept, splits = deal(challenging, None, groups, 5, np.random.RandomState(0))
    assert sorted(kept) == list(np.flatnonzero(~challenging))
    assert sorted(np.concatenate([split.scored for split in splits])) == list(range(count))
    sizes = [len(split.scored) for split in splits]
    assert len(sizes) == min(5, count)
    assert max(sizes) - min(sizes) <= 1
    for split in splits:
        scored = set(groups[kept[split.scored]])
        assert not scored & set(groups[split.clean])
        assert not scored & set(groups[split.challenging])
        assert len(split.clean) == count - len(split.scored)
        assert len(split.challenging) == 3 * len(split.clean) + 5


def test_a_fraction_holds_out_one_part() -> None:
    challenging = np.arange(30) >= 20
    kept, (split,) = deal(challenging, None, None, 0.4, np.random.RandomState(0))
    assert len(kept) == len(split.scored) == 8
    assert sorted([*kept, *split.clean]) == list(range(20))
    detector = UncertaintyDetector(calibration_fraction=0.4)
    detector.fit({"logits": np.random.default_rng(0).normal(size=(50, 3))})
    assert len(detector.module_.calibration_scores) == 20


def test_without_groups_every_challenge_is_in_every_fit() -> None:
    challenging = np.arange(30) >= 20
    _, splits = deal(challenging, None, None, 4, np.random.RandomState(0))
    assert all(list(split.challenging) == list(range(20, 30)) for split in splits)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (np.zeros(9, int), "groups must be integers of shape"),
        (np.zeros(60), "groups must be integers of shape"),
        (np.zeros(60, int), "groups must tell at least 2 of clean samples apart; there was 1"),
    ],
)
def test_bad_groups_are_named(groups: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UncertaintyDetector(log=False).fit(clean(np.random.default_rng(0), 60), groups=groups)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(("count", "draws"), [(50, 16), (160, 10), (1000, 3)])
def test_flagged_share_keeps_its_promise_and_most_of_its_power(count: int, draws: int, labels: bool) -> None:
    """The mean over draws, against the Beta law of the threshold and what the fits differ by.

    From 50 samples a few ranks of power go where each score's tail is estimated (see test_combined); H, trained once
    more on all samples, is a little surer of clean ones than it was of those left out.
    """
    shares = np.empty((draws, len(RATES)))
    for draw in range(draws):
        rng = np.random.default_rng([count, draw])
        X, y, kinds = clean(rng, count), np.zeros(count, int), np.zeros(count, int)
        detector = UncertaintyDetector(log=False, hidden=8, weight=4.0)
        if labels:
            kinds = np.concatenate([kinds, 1 + np.arange(count) % 4])
            y = (kinds > 0).astype(int)
            other = clean(rng, count)
            other = {name: value + 0.5 * kinds[count:, None] for name, value in other.items()}
            X = {name: np.concatenate([X[name], other[name]]) for name in X}
        found = detector.fit(X, y, kinds=kinds).decision_function(clean(rng, 2000))
        shares[draw] = [(found > detector.threshold(rate)).mean() for rate in RATES]
        assert len(detector.module_.calibration_scores) == count
    for rate, share in zip(RATES, shares.T, strict=True):
        # Twice the variance of one calibration set: the fits are drawn, too.
        error = 4 * np.sqrt(2 * rate * (1 - rate) * (1 / (count + 2) + 1 / 2000) / draws)
        assert share.mean() < rate + error
        assert share.mean() > rate - error - 0.8 / count - 0.2 * rate * labels


def test_neighbours_count_only_where_a_class_may_have_as_many() -> None:
    rng = np.random.default_rng(0)
    settings = Settings(False, 8, 24, 10, 0)
    blocks = {"features": rng.normal(size=(100, 6)), "logits": rng.normal(size=(100, 11))}
    assert not list(Features.scores(blocks, settings))
    assert list(Features.scores({name: value[:, :5] for name, value in blocks.items()}, settings))
    assert list(Features.scores({"features": blocks["features"]}, settings))


def test_one_network_more_sees_each_block_alone() -> None:
    sees = views([2, 1, 3], 2)
    assert sees.tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert views([4], 3).tolist() == [[1, 1, 1, 1]] * 3


def test_a_network_says_nothing_of_what_it_does_not_see() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1], 60)
    rows = rng.normal(size=(120, 4)) + kinds[:, None]
    sees = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    h = fit_perceptrons(rows, kinds, hidden=8, sees=sees, seed=0)
    assert torch.equal((h.hidden_weight != 0).all(2), sees.bool())
    first = type(h)(**{name: value[:1] for name, value in h.named_buffers()})
    moved = torch.tensor(rows).clone()
    moved[:, 2:] += 5
    assert torch.equal(first(moved), first(torch.tensor(rows)))
    assert not torch.equal(h(moved), h(torch.tensor(rows)))
