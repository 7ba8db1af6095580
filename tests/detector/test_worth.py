"""Blocks are judged by what they find of kinds that training did not see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgrad import UncertaintyDetector
from fastgrad.detector.worth import Judge, Placements, State, _variance
from fastgrad.metrics import auroc

KINDS = ("noise", "blur", "contrast", "shuffle")


def samples(seed: int = 0) -> tuple[dict[str, Tensor], np.ndarray, np.ndarray]:
    """Logits that say little, activations that find every kind, h that finds none, image statistics of one kind each.

    Each kind moves a column of its own in the image statistics, so that what is learned of some kinds says nothing of
    the others.
    """
    rng = np.random.default_rng(seed)
    kinds = np.array([""] * 900 + [kind for kind in KINDS for _ in range(180)])
    held_out = np.concatenate([np.arange(900) >= 600, np.tile(np.arange(180) >= 90, len(KINDS))])
    n = len(kinds)
    challenging = kinds != ""
    logits = rng.normal(size=(n, 4)) + 0.3 * challenging[:, None]
    activations = rng.normal(size=(n, 30)) + 0.4 * challenging[:, None]
    features = rng.normal(size=(n, 6))
    image = rng.normal(size=(n, 8))
    for column, kind in enumerate(KINDS):
        image[kinds == kind, column] += 4
    blocks = {"logits": logits, "activations": activations, "features": features, "image": image}
    return {name: torch.as_tensor(value) for name, value in blocks.items()}, kinds, held_out


def judge(own: bool = False, members: int = 3) -> Judge:
    """With many ``members`` H is as good as made of networks that see all blocks."""
    X, kinds, held_out = samples()
    return Judge(UncertaintyDetector(log=False, hidden=16, members=members), X, kinds, held_out, own=own)


def test_what_finds_every_kind_is_worth_most_and_h_does_not_read_what_it_learns_by_heart() -> None:
    names = ["logits", "features", "image", "activations"]
    choice = judge(members=30).choose(names, dict.fromkeys(names, 0.0), 0.2)
    assert "activations" in choice.kept
    assert "activations" in choice.seen
    assert "image" in choice.kept
    assert "image" not in choice.seen
    gain, interval = choice.worth["activations"]
    assert gain > interval > 0
    assert choice.worth["features"][0] < 0.01
    assert choice.auroc > 0.8
    assert set(choice.seen) <= set(choice.kept) <= set(names)


def test_networks_that_see_one_block_find_what_others_learned_by_heart_hides() -> None:
    """Where each kind has a column of its own, an H that sees that block alone with others misses kinds left out."""
    every = frozenset(["logits", "activations", "image"])
    state = State(every, every)
    assert judge().mean(state) > judge(members=30).mean(state) + 0.01


def test_what_costs_more_is_kept_only_within_the_budget_and_beyond_its_interval() -> None:
    names = ["logits", "features", "activations"]
    price = {"logits": 0.0, "features": 0.5, "activations": 1.0}
    assert judge().choose(names, price, 0.9).kept == ["logits"]
    assert judge().choose(names, price, 2.0).kept == ["logits", "activations"]


@pytest.mark.parametrize(("gain", "kept"), [(0.0005, False), (0.0015, True)])
def test_less_than_a_thousandth_buys_nothing_however_sure(
    gain: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def surely(_: Judge, state: State, other: State) -> tuple[float, float]:
        return (gain if state.kept > other.kept else -gain), 1e-5

    monkeypatch.setattr(Judge, "_gain", surely)
    price = {"logits": 0.0, "features": 0.5}
    assert ("features" in judge().choose(list(price), price, 2.0).kept) is kept


@pytest.mark.parametrize(("allowance", "kept"), [(0.2, False), (1.0, True)])
def test_roughness_is_where_a_choice_begins_only_with_room_for_a_pass(
    allowance: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No change is for the better: what is there at the end was there in the beginning.
    monkeypatch.setattr(Judge, "_gain", lambda _self, _state, _other: (0.0, 0.01))
    X, kinds, held_out = samples()
    X["roughness"] = X["features"]
    names = ["logits", "image", "roughness"]
    found = Judge(UncertaintyDetector(log=False, hidden=16), X, kinds, held_out, own=False)
    choice = found.choose(names, dict.fromkeys(names, 0.0), allowance)
    assert choice.kept == (names if kept else names[:2])


def test_no_judged_kind_was_learned_nor_one_that_resembles_it() -> None:
    one = judge()
    for learned, judged in one.folds:
        assert not set(one.kinds[learned]) & set(one.kinds[judged])
        assert not set(learned) & set(judged)
    assert {kind for _, judged in one.folds for kind in one.kinds[judged]} == set(KINDS)


def test_the_users_own_kinds_are_not_left_out() -> None:
    one = judge(own=True)
    for learned, judged in one.folds:
        assert set(one.kinds[learned]) == set(one.kinds[judged]) == set(KINDS)
        assert not set(learned) & set(judged)


def test_a_set_is_as_good_as_its_mean_over_kinds() -> None:
    one = judge()
    state = State(frozenset({"logits", "activations"}), frozenset({"logits"}))
    values = one._quality(state)
    assert set(values) == set(KINDS)
    assert one.mean(state) == pytest.approx(np.mean([kind.own.mean() for kind in values.values()]))


def test_placements_give_the_area_and_the_spread_of_differences() -> None:
    """Against the definition, ties included, and against new samples drawn again and again."""
    rng = np.random.default_rng(0)
    clean, own = rng.integers(0, 6, 40).astype(float), rng.integers(2, 9, 30).astype(float)
    found = Placements.of(clean, own)
    assert found.own.mean() == pytest.approx(auroc(clean, own))
    assert found.clean.mean() == pytest.approx(auroc(clean, own))

    def draw() -> tuple[float, float]:
        base, kind = rng.normal(size=(80, 2)), rng.normal(1, 1, (60, 2))
        for rows in (base, kind):
            rows[:, 1] = 0.8 * rows[:, 0] + 0.6 * rows[:, 1]
        one, other = (Placements.of(base[:, i], kind[:, i]) for i in (0, 1))
        variance = _variance(one.clean - other.clean) + _variance(one.own - other.own)
        return float(one.own.mean() - other.own.mean()), variance

    drawn = np.array([draw() for _ in range(600)])
    # The variance of 600 draws is itself known to 6 %; three times that.
    assert drawn[:, 1].mean() == pytest.approx(drawn[:, 0].var(), rel=0.18)


def test_a_kept_block_that_h_does_not_read_is_worth_its_own_score() -> None:
    names = ["logits", "image", "activations"]
    one = judge(members=30)
    choice = one.choose(names, dict.fromkeys(names, 0.0), 0.2)
    assert "image" in set(choice.kept) - set(choice.seen)
    kept, seen = frozenset(choice.kept), frozenset(choice.seen)
    assert choice.worth["image"] == one._gain(State(kept, seen), State(kept - {"image"}, seen))
