"""Failure prediction: areas are of orders, intervals of resampled inputs, and the text says what they say."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from bench.paper.failure_subjects import CLEAN, CORRUPT, TOGETHER, Found, Texts, _pooled
from bench.paper.failures import ENSEMBLE, SOFTMAX, Answers, Judge, areas, curve, ensemble, standing
from bench.paper.table import Options
from bench.paper.tables.failure import SHOWN, verdict, write
from bench.paper.texts import _dropped, _mistyped
from fastgrad import TwoStageModel

COUNT = 200


def answers(quality: float, seed: int = 0) -> Answers:
    """Uncertainties that follow the errors the closer, the higher ``quality``."""
    rng = np.random.default_rng(seed)
    errors = (np.random.default_rng(1).random(COUNT) < 0.2).astype(float)
    return Answers(quality * errors + rng.standard_normal(COUNT), errors)


def test_areas_order_methods_and_a_copy_of_the_softmax_is_no_difference() -> None:
    found = {
        SOFTMAX: [answers(1.0)],
        "same": [answers(1.0)],
        "perfect": [answers(100.0)],
        "none": [answers(0.0, seed=2)],
    }
    rows = areas(found, np.arange(COUNT))
    assert rows["perfect"]["aurc"] == pytest.approx(rows["perfect"]["oracle"])
    assert rows["perfect"]["aurc"] < rows[SOFTMAX]["aurc"] < rows["none"]["aurc"]
    assert rows["same"]["less softmax"] == 0
    for name, expected in {"same": "none", "perfect": "better", "none": "worse"}.items():
        assert standing(rows[name]["interval of the difference"]) == expected
    low, high = rows[SOFTMAX]["interval"]
    assert low < rows[SOFTMAX]["aurc"] < high
    said = verdict(rows)
    assert "*perfect*" in said.split(";")[0]
    assert "adds nothing" in said
    assert "adds nothing" not in verdict(
        {"fastgrad, both" if k == "perfect" else k: v for k, v in rows.items()}
    )


def test_copies_of_one_input_do_not_narrow_an_interval() -> None:
    one = answers(1.0)
    copies = Answers(np.tile(one.uncertainty, 5), np.tile(one.errors, 5))
    alone, five, careless = (
        areas({SOFTMAX: [own]}, source)[SOFTMAX]["interval"]
        for own, source in (
            (one, np.arange(COUNT)),
            (copies, np.tile(np.arange(COUNT), 5)),
            (copies, np.arange(5 * COUNT)),
        )
    )
    assert five == pytest.approx(alone, abs=0.01)
    assert careless[1] - careless[0] < 0.7 * (five[1] - five[0])


def test_several_networks_are_a_mean_and_an_ensemble_is_one_of_its_own() -> None:
    own = [answers(1.0, seed) for seed in range(3)]
    rows = areas({SOFTMAX: own}, np.arange(COUNT))
    each = [areas({SOFTMAX: [one]}, np.arange(COUNT))[SOFTMAX]["aurc"] for one in own]
    assert rows[SOFTMAX]["aurc"] == pytest.approx(np.mean(each))
    coverage, risk, best = curve(own)
    assert coverage[-1] == 1
    assert risk[-1] == pytest.approx(best[-1]) == pytest.approx(own[0].errors.mean())
    members = [torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0.7, 0.3], [0.9, 0.1]])]
    joined = ensemble(members, [(None, torch.tensor([0, 1]))])
    np.testing.assert_allclose(joined.uncertainty, [0.2, 0.35], rtol=1e-6)
    np.testing.assert_array_equal(joined.errors, [0, 1])


def test_a_judge_gives_every_method_in_the_order_of_its_number() -> None:
    pytest.importorskip("pytorch_ood")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    x = torch.randn(160, 6)
    labels = torch.where(torch.rand(160) < 0.8, net(x).argmax(1), torch.randint(3, (160,)))
    batches = list(zip(x.split(40), labels.split(40), strict=True))
    model = TwoStageModel(net, blocks=["logits", "features"]).fit(
        batches[:2], (), calibration_loader=batches[2:]
    )
    judge = Judge(model, batches[2:])
    found, softmax = judge(batches[:2])
    live = model(x[:80])
    np.testing.assert_allclose(found[SOFTMAX].uncertainty, 1 - softmax.amax(1), rtol=1e-12)
    np.testing.assert_allclose(found["fastgrad, uncertainty"].uncertainty, live.uncertainty, rtol=1e-6)
    np.testing.assert_array_equal(found["energy"].errors, live.logits.argmax(1) != labels[:80])
    # Less sure by its probability, or more unusual, is less sure by both.
    both, doubt = found["fastgrad, both"].uncertainty, found["fastgrad, probabilities"].uncertainty
    u = found["fastgrad, uncertainty"].uncertainty
    below = (doubt[:, None] <= doubt) & (u[:, None] <= u)
    assert (both[:, None] <= both + 1e-9)[below].all()


def test_the_page_has_every_case_of_every_network(tmp_path: pathlib.Path) -> None:
    by_set = {
        name: {method: [answers(1.0, seed)] for seed, method in enumerate(SHOWN)} for name in ("", "a", "b")
    }
    source = dict.fromkeys(by_set, np.arange(COUNT))
    found = Found(*_pooled(by_set, source), {ENSEMBLE: 5.0}, "A network")
    assert {case: len(ids) for case, ids in found.source.items()} == {
        CLEAN: COUNT, CORRUPT: 2 * COUNT, TOGETHER: 3 * COUNT,
    }  # fmt: skip
    options = Options(tmp_path, tmp_path, tmp_path)
    page = write(options, [Texts(options)], [found])
    assert len(page.rows) == 3 * len(SHOWN)
    assert {row["forward_passes"] for row in page.rows} == {1.0, 5.0}
    for row in page.rows:
        assert row["oracle"] <= row["aurc"]
    assert len(page.axes.get_figure().axes) == 3


def test_words_are_dropped_and_mistyped_as_often_as_it_says() -> None:
    words = ["letters"] * 4000
    kept, typed = (change(words, np.random.default_rng(0)) for change in (_dropped, _mistyped))
    assert len(kept) / 4000 == pytest.approx(0.6, abs=0.05)
    changed = [word for word in typed if word != "letters"]
    # The two t in the middle change places unseen.
    assert 0.3 < len(changed) / 4000 < 0.5
    assert all(sorted(word) == sorted("letters") and word[0] == "l" and word[-1] == "s" for word in changed)
    assert _mistyped(["to", "the"], np.random.default_rng(0)) == ["to", "the"]
