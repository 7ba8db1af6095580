"""A brightness that nobody can see raises no alarm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastgrad import TwoStageModel
from fastgrad.challenges import PixelRange
from fastgrad.commands import demo
from fastgrad.detector.grey_levels import shifted, shifts


def test_half_of_the_sources_are_shifted() -> None:
    levels = shifts(1000, 0)
    assert (levels != 0).sum() == 500
    assert levels.abs().max() <= 1
    # Uniform on both sides: the mean of 500 has a standard deviation of 1 / sqrt(1500).
    assert abs(float(levels[levels != 0].mean())) < 3.3 / 1500**0.5
    assert torch.equal(shifts(1000, 0), levels)
    assert not torch.equal(shifts(1000, 1), levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_level_is_a_step_of_the_range(dtype: torch.dtype) -> None:
    mean, std = [0.2, 0.4, 0.5], [0.5, 1.0, 0.25]
    bytes_ = torch.randint(0, 255, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0)).to(dtype)

    def normalised(x: Tensor) -> Tensor:
        return (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    for form, how in ((lambda x: x, {"clip": (0, 255)}), (lambda x: x / 255, {"clip": (0, 1)}),
                      (normalised, {"mean": mean, "std": std})):  # fmt: skip
        x = form(bytes_)
        brighter = shifted(x, 1.0, PixelRange.of(x, **how))
        assert brighter.dtype == x.dtype
        torch.testing.assert_close(brighter, form(bytes_ + 1), rtol=1e-5, atol=1e-6)


def test_one_grey_level_raises_no_alarm() -> None:
    """Digits have a background of exactly 0."""
    torch.manual_seed(0)
    model, x = demo.digit_network().eval(), demo.digits(torch.Generator().manual_seed(0))[0]

    def flagged(two_stage: TwoStageModel, change: float) -> float:
        return float((two_stage(x[200:400] + change / 255).uncertainty > two_stage.threshold()).float().mean())

    usual = TwoStageModel(model).fit([x[:200]], clip=(0, 1))
    assert max(flagged(usual, change) for change in (0, 1, -1)) <= 0.1
    levels = usual.report().levels
    assert levels is not None
    assert list(levels) == ["unchanged", "one grey level brighter", "one darker", "noise of one"]
    assert max(levels["one grey level brighter"], levels["one darker"]) <= 0.1
    # Noise is left to be found: a small attack looks the same.
    assert levels["noise of one"] > 0.9
    assert f"one grey level brighter {levels['one grey level brighter']:.0%}" in str(usual.report())
    # The same challenges, and the clean images as they are.
    features = usual.read_features([x[:200]], clip=(0, 1))
    assert usual.extraction_ is not None
    _, blocks = usual.extraction_(x[:200])
    blocks = {name: torch.cat([blocks[name], values[200:]]) for name, values in features.blocks.items()}
    assert flagged(TwoStageModel(model).fit_features(replace(features, blocks=blocks)), 1) > 0.5


def test_what_has_no_grid_is_read_as_it_is() -> None:
    layers = nn.Sequential(nn.Embedding(40, 4), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    ids = torch.randint(1, 40, (60, 6), generator=torch.Generator().manual_seed(0))
    numbers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    for model, x in ((layers, ids), (numbers, torch.rand(60, 6))):
        two_stage = TwoStageModel(model, blocks=["logits"]).fit([x], challenges=None)
        assert two_stage.report().levels is None
        assert torch.equal(two_stage.read_features([x], challenges=None).logits, model(x).detach())
