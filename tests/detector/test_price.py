"""The price of an answer: predicted by the blocks, measured when asked, and never part of a fit."""

from __future__ import annotations

import pytest
import torch
from small_images import images, loader, small_network
from small_nets import Net
from torch import Tensor, nn

from fastgrad import TwoStageModel
from fastgrad.blocks import BLOCKS, DEFAULT_BLOCKS
from fastgrad.detector import price


class Counted(nn.Flatten):
    """Counts forward passes."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.passes += 1
        return super().forward(x)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), Counted(), nn.Linear(8, 4)).eval()


@pytest.mark.parametrize(("blocks", "passes"), [(["logits"], 1), (["logits", "view"], 2)])
def test_network_and_answer_take_turns(blocks: list[str], passes: int) -> None:
    model = network().train()
    two_stage = TwoStageModel(model, blocks=blocks).fit([images(60)], challenges=None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Counted.passes = 0
    found = two_stage.price(images(8), rounds=5)
    # For eight inputs and for one: a round to warm up, and in each the network's own pass.
    assert Counted.passes == 2 * 6 * (passes + 1)
    assert found.batch == 8
    for median, (low, high) in ((found.median, found.interval), (found.single, found.single_interval)):
        assert 0 < low <= median <= high
    assert f"{found.median:.2f} forward passes" in str(found)
    assert "on batches of 8" in str(found)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_interval_holds_the_median_of_its_ratios() -> None:
    assert price._interval([1.0, 9.0, 2.0]) == (1.0, 9.0)
    # Of fifteen, the third and the last but two: outside of both lies less than one in twenty.
    assert price._interval([float(i) for i in range(15)]) == (3.0, 11.0)
    assert price._interval([float(i) for i in range(101)]) == (40.0, 60.0)


def test_price_of_a_network_that_writes() -> None:
    """Ids that begin at 1 become others in each pass."""
    layers = nn.Sequential(nn.Embedding(40, 4), nn.Flatten(), nn.Linear(20, 4))
    model = Net(lambda net, ids: net.network(ids.sub_(1)), network=layers).eval()
    ids = torch.randint(1, 41, (60, 5), generator=torch.Generator().manual_seed(0))
    assert TwoStageModel(model).fit([ids]).price(ids[:1], rounds=3).median > 0


def test_predicted_prices_are_those_of_the_blocks() -> None:
    report = (
        TwoStageModel(small_network(), blocks=["logits", "view", "gradients"])
        .fit([images(60)], challenges=None)
        .report()
    )
    assert report.prices == {"logits": 0, "view": 1, "gradients": 8.5}
    assert report.predicted == 10.5
    assert "10.5 forward passes predicted, 1 of them for view, 8.5 of them for gradients; price(x) measures it" in str(
        report
    )


def test_report_says_why_blocks_are_left_out() -> None:
    assert set(DEFAULT_BLOCKS) <= set(BLOCKS)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    report = TwoStageModel(model).fit([torch.rand(60, 6)], challenges=None).report()
    assert report.kept == ["logits", "activations"]
    assert report.left_out["image"] == "the input is not one image (B, C, H, W), at least 3 x 3"
    assert f"without image: {report.left_out['image']}" in str(report)
    everything = TwoStageModel(small_network()).fit(loader(60), challenges=None)
    assert (everything.report().kept, everything.report().left_out) == (list(DEFAULT_BLOCKS), {})
