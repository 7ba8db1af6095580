"""Estimates of an error rate without labels, on streams whose answer is known."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_ood")

from bench.detection import error_rate
from bench.detection.error_rate import Answers, Known
from fastgrad import TwoStageModel
from fastgrad.blocks import BLOCKS, Features


def stream(count: int, seed: int, *, sure: float = 2.0, shifted: float = 0.0) -> Answers:
    """Answers whose softmax is calibrated at ``shifted`` 0; other streams lose ``shifted`` of their labels."""
    rng = np.random.default_rng(seed)
    logits = sure * rng.normal(size=(count, 4))
    p = error_rate.softmax(logits)
    labels = (p.cumsum(1) > rng.random((count, 1))).argmax(1)
    labels = np.where(rng.random(count) < shifted, (logits.argmax(1) + 1) % 4, labels)
    wrong = (logits.argmax(1) != labels).astype(float)
    risk = np.clip(1 - p.max(1) + 0.05, 0, 1)
    return Answers(logits, p, risk, rng.exponential(size=count), wrong, labels)


@pytest.fixture(scope="module")
def known() -> Known:
    clean = stream(4000, 0)
    generated = [stream(300, seed, sure=sure) for seed, sure in enumerate([1.0, 1.5, 2.0, 3.0] * 3)]
    return Known(clean, generated, 1.0, 4000, float(np.quantile(clean.risk, 1 - clean.wrong.mean())))


@pytest.mark.parametrize("sure", [1.0, 2.0, 3.0])
def test_every_estimate_is_right_where_confidence_is(known: Known, sure: float) -> None:
    """The softmax is calibrated for every spread of the logits, so each estimate must find the error rate."""
    seen = stream(1000, 9, sure=sure)
    truth = seen.wrong.mean()
    for name, estimate in error_rate.estimates(known).items():
        # The thresholds of ATC, COTT and ours are those of clean inputs; the risk is too high by .05 by construction.
        allowed = 0.15 if name in ("COT", "COTT", "MaNo", "nuclear norm") else 0.07
        if sure == 2 or not ("ATC" in name or name in ("COTT", error_rate.OURS)):
            assert estimate(seen)[0] == pytest.approx(truth, abs=allowed), name


def test_transport_costs_ignore_label_order() -> None:
    p = error_rate.softmax(np.random.default_rng(0).normal(size=(5, 3)))
    labels = np.array([0, 0, 1, 2, 2])
    orders = [sum(1 - p[i, labels[place]] for i, place in enumerate(order)) for order in permutations(range(5))]
    assert error_rate.costs(p, labels).sum() == pytest.approx(min(orders))
    many = error_rate.costs(np.full((2, 21), 1 / 21), np.array([0, 1]))
    assert np.isnan(many).all()


def test_cott_counts_errors_on_clean_inputs(known: Known) -> None:
    found = error_rate.of_costs(known)(known.clean)
    assert found == pytest.approx(known.clean.wrong.mean(), abs=1e-3)


def test_what_no_estimate_of_confidence_can_see(known: Known) -> None:
    seen = stream(1000, 9, shifted=0.5)
    every = error_rate.estimates(known)
    assert all(every[name](seen)[0] < seen.wrong.mean() - 0.2 for name in ("ATC, confidence", "DoC", "COT", "COTT"))


def test_a_kind_left_out_is_answered_by_fits_without_it_and_without_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sources, kinds = torch.arange(60).repeat(3), [""] * 60 + ["blur"] * 60 + ["noise"] * 60
    logits = torch.randn(180, 4)
    labels = torch.where(torch.arange(180) < 120, logits.argmax(1), (logits.argmax(1) + 1) % 4)  # noise misleads
    whole = Features.of(logits, {"logits": logits}, kinds=kinds, sources=sources, labels=labels)
    fits: list[Features] = []
    own = TwoStageModel.fit_features
    monkeypatch.setattr(TwoStageModel, "fit_features", lambda self, part: fits.append(part) or own(self, part))
    monkeypatch.setattr(error_rate, "read_for", lambda *_: whole)
    experiment = SimpleNamespace(model=torch.nn.Linear(3, 4), draw=0)
    rows = list(error_rate.of_kinds_left_out(experiment, [BLOCKS["logits"]()]))
    assert [(row["case"], row.get("wrong"), row.get("inputs")) for row in rows] == [
        ("blur", 0, 60), ("noise", 60, 60), ("least kind", None, None)
    ]  # fmt: skip
    assert (rows[-1]["came true"], rows[-1]["kinds"]) == (0, 2)
    assert [sorted({*part.kinds}) for part in fits] == [["", "noise"]] * 2 + [["", "blur"]] * 2
    assert [set((part.sources % 2).tolist()) for part in fits] == [{0}, {1}] * 2


def test_every_group_weighs_the_same() -> None:
    values = [("clean", 1.0, 100, 1.0, True, 10.0)] + [("attacks", 0.0, 100, -3.0, False, 20.0)] * 9
    rows = {row["case"]: row for row in error_rate.summed(values, with_bounds=True)}
    assert rows["all streams"] == {"case": "all streams", "error": 2, "bias": -1, "inside": 0.5, "width": 15}
    assert rows["attacks"] == {"case": "attacks", "error": 3, "bias": -3, "inside": 0, "width": 20}
    (left,) = error_rate.summed([("clean", 1.0, 100, np.nan, False, np.nan)], with_bounds=False)
    assert "case" not in left
    assert "more than 20 classes" in left["not run"]


def test_streams_have_their_size_and_share(known: Known) -> None:
    clean, bad = stream(200, 1), stream(200, 2, shifted=1.0)
    cases = {"FGSM": bad, "fog": bad}
    made = list(error_rate.streams(clean, cases, np.random.default_rng(0)))
    assert {size for _, _, size, _ in made} == set(error_rate.SIZES)
    assert {group for group, *_ in made} == {"clean", "attacks", "corruptions unlike generated ones", "mixed"}
    for group, share, size, seen in made:
        assert len(seen.wrong) == len(seen.logits) == size
        if group == "mixed" and size == 1000 and share == 0:
            assert seen.wrong.mean() > 0.9
