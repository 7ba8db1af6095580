import json
import math
import time
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from fastgrad.batches import take
from fastgrad.blocks import BLOCKS, Block, Logits
from fastgrad.blocks.extraction import Extraction, arguments
from fastgrad.blocks.forward import Pass
from fastgrad.blocks.subject import watch
from fastgrad.detector import fitting
from fastgrad.detector.fitting import _blocks
from fastgrad.detector.model import TwoStageModel
from fastgrad.detector.price import DEFAULT_BLOCKS, EXTENDED_BLOCKS, _seconds, fit_to_budget, price
from fastgrad.detector.report import Report


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("fastgrad.detector.price.SECONDS", 0.3)


class Again(Block):
    """Runs the network once more."""

    name = "again"
    shapes = "(B, N)"

    def price(self, subject):
        return 1.0

    def values(self, found: Pass) -> torch.Tensor:
        return found.again(found.image())


class Another(Again):
    name = "another"


class Counted(nn.Flatten):
    """Counts forward passes."""

    passes = 0

    def forward(self, x):
        Counted.passes += 1
        return super().forward(x)


@pytest.fixture
def counting(monkeypatch):
    """A clock that ticks once a forward pass, so that no machine is too busy for a price."""

    def ticks(run, model):
        before = Counted.passes
        run()
        return Counted.passes - before

    monkeypatch.setattr("fastgrad.detector.price._seconds", ticks)


def network():
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()] * 3
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), Counted(), nn.Linear(32, 4))


def fitted(model, blocks, x, limit, answer=None):
    """The price of blocks, read by an extraction unless ``answer`` says what else is to run."""
    subject = watch(model, *arguments(x))
    return fit_to_budget(
        model, blocks, x, limit, subject=subject, answer=answer or (lambda own: Extraction(model, own))
    )


@pytest.fixture
def images():
    return torch.rand(8, 3, 48, 48)


@pytest.mark.parametrize(("limit", "kept"), [(1.5, ["logits"]), (2.5, ["logits", "again"])])
def test_blocks_are_taken_off_the_end_until_the_measured_price_fits(counting, images, limit, kept):
    report = fitted(network(), [Logits(), Again(), Another()], images, limit)
    assert list(report.blocks) == kept
    assert [name for name, _ in report.dropped] == ["another", "again"][: 3 - len(kept)]
    assert report.measured <= limit
    assert report.predicted == len(kept)
    assert report.measured == pytest.approx(report.predicted, abs=0.3)
    assert "above" in report.dropped[0][1]


def test_where_nothing_fits_the_first_block_stays_and_a_warning_says_so(counting, images):
    with pytest.warns(RuntimeWarning, match=r"budget must be at least .* 'again', which is kept alone; it was 1.2"):
        report = fitted(network(), [Again(), Logits()], images, 1.2)
    assert report.blocks == ("again",)
    assert report.measured > 1.2


def test_what_cannot_be_served_is_dropped_with_its_reason():
    model = nn.Sequential(nn.Linear(6, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))
    blocks = [BLOCKS[name]() for name in EXTENDED_BLOCKS]
    report = fitted(model, blocks, torch.rand(256, 6), math.inf)
    assert report.blocks == ("logits", "activations")
    assert dict(report.dropped)["image"] == "the input is not one image (B, C, H, W), at least 3 x 3"


def test_the_answer_itself_is_measured_and_the_model_stays_as_it_was(counting, images):
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def answer(blocks):
        seen.append([block.name for block in blocks])
        return lambda x: [model(x) for _ in range(1 + len(blocks))]

    report = fitted(model, [Logits(), Again()], images, 2.5, answer)
    assert seen == [["logits", "again"], ["logits"]]
    assert report.measured == pytest.approx(2, abs=0.3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("correct", [False, "always"])
def test_a_fit_measures_the_parts_that_its_user_will_call(monkeypatch, correct):
    measured = []
    monkeypatch.setattr("fastgrad.detector.price.price", lambda _, run, *__: (measured.append(run), (1.0, 0.0))[1])
    x = torch.rand(60, 3, 8, 8)
    two_stage = TwoStageModel(network()).fit([(x, torch.arange(60) % 4)], correct=correct, verbose=False)

    def parts(model):
        return {name: value.dim() for name, value in model.state_dict().items()}

    draft = measured[0]
    assert parts(draft) == parts(two_stage)
    assert [block.name for block in draft.extraction_.blocks] == [b.name for b in two_stage.extraction_.blocks]
    answer = draft(take(x, slice(0, 5), 60))
    assert torch.equal(answer.logits, two_stage(x[:5]).logits)
    assert (answer.risk is None) == (two_stage.risk_ is None)
    assert (draft.correction_ is None) != bool(correct)
    assert ("correction    kept as asked, but not certainly better: " in str(two_stage.report())) == bool(correct)


def test_dropped_blocks_cause_no_further_fit(monkeypatch):
    fitted, drafts = [], []
    chosen, plain = fitting.choose, fitting.fit_table
    monkeypatch.setattr(
        fitting, "choose", lambda *given, draft, **how: (drafts.append(draft), chosen(*given, draft=draft, **how))[1]
    )
    monkeypatch.setattr("fastgrad.detector.price.price", lambda *_: (9.0, 0.0))
    monkeypatch.setattr(
        fitting, "fit_table", lambda *given, draft: (fitted.append(draft), plain(*given, draft=draft))[1]
    )
    x = torch.rand(60, 3, 8, 8)
    two_stage = TwoStageModel(network())
    with pytest.warns(RuntimeWarning, match="which is kept alone"):
        two_stage.fit([(x, torch.arange(60) % 4)], correct="always", verbose=False)
    assert len(two_stage.report().price.dropped) == len(DEFAULT_BLOCKS) - 1
    assert drafts == fitted == [True] * len(DEFAULT_BLOCKS) + [False]
    assert two_stage.gate_ is not None


def test_a_long_batch_is_cut_and_the_price_carries_its_error(monkeypatch, counting, images):
    monkeypatch.setattr("fastgrad.detector.price.PASS", 0.0)
    report = fitted(network(), [Logits()], images, 10.0)
    assert report.batch == 1
    model = network()
    assert price(model, model, images) == (1.0, 0.0)
    uneven = iter([1, 3] * 100)
    ratio, error = price(model, lambda x: [model(x) for _ in range(next(uneven))], images)
    assert 1 <= ratio <= 3
    assert error == 1.0


def test_a_thread_clock_of_coarse_steps_is_not_asked(monkeypatch, images):
    """Windows counts in steps of 16 ms: a ratio of two zeros. Nothing but the names of clocks tells it apart."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    monkeypatch.delattr(time, "CLOCK_THREAD_CPUTIME_ID", raising=False)
    model = network()
    assert 0 < price(model, model, images)[0] < math.inf


@pytest.mark.skipif(not hasattr(time, "CLOCK_THREAD_CPUTIME_ID"), reason="as on Windows")
def test_with_one_thread_what_else_runs_is_no_part_of_a_time(monkeypatch):
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert (_seconds(lambda: time.sleep(0.1), nn.Identity()) < 0.05) == (threads == 1)


@pytest.mark.parametrize(("seconds", "rounds"), [(60.0, 7), (0.0, 3)])
def test_network_and_answer_take_turns_in_as_many_rounds_as_said(monkeypatch, seconds, rounds):
    monkeypatch.setattr("fastgrad.detector.price.SECONDS", seconds)
    monkeypatch.setattr("fastgrad.detector.price._seconds", lambda run, model: (run(), 1.0)[1])
    model, calls = nn.Identity(), []
    model.register_forward_hook(lambda *_: calls.append("network"))
    price(model, lambda x: calls.append("answer"), torch.zeros(2, 3))
    turns = [("network", "answer"), ("answer", "network")] * 4
    assert calls == ["answer", "network", *(name for turn in turns[:rounds] for name in turn)]


def test_the_price_of_single_inputs_is_measured_too_and_said_where_it_is_above_the_limit(monkeypatch, counting, images):
    monkeypatch.setattr("fastgrad.detector.price.PASS", 1.0)
    model = network()

    def answer(blocks):
        return lambda x: [model(x) for _ in range(2 if len(x) == 1 else 1)]

    found = fitted(model, [Logits()], images, 1.5, answer)
    assert (found.measured, found.single) == (1.0, 2.0)
    report = Report(replace(found, dropped=(("image", "beyond"),), limit=1.5), 8, 8, {}, 1.0, 8, False, "none")
    assert f"{found.single:.2f} on single inputs, above it" in str(report)
    assert "without image: beyond" in str(report)
    endless = replace(report, price=replace(found, limit=math.inf))
    for one in (report, endless):
        assert Report.from_json(json.loads(json.dumps(asdict(one)))) == one
    assert "single inputs" not in str(replace(report, price=replace(found, single=1.4)))


def test_presets_hold_known_blocks_and_the_second_pass_begins_at_two():
    for budget, names in ((1.2, DEFAULT_BLOCKS), (2.0, (*DEFAULT_BLOCKS, "view"))):
        assert tuple(block.name for block in _blocks(None, budget, None)) == names
    assert set(EXTENDED_BLOCKS) <= set(BLOCKS)
