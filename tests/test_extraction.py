from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgrad.extraction import Extraction


@pytest.mark.parametrize("gradients", ["signals", "contrasts", "last_layer"])
@pytest.mark.parametrize("samples", [1, 4, 7])
def test_a_batch_worked_through_in_pieces_gives_the_same_blocks(
    samples: int, gradients: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(samples)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).double().eval()
    x = torch.randn(samples, 3, 8, 8, dtype=torch.float64)
    _, whole = Extraction(net, gradients)(x)
    monkeypatch.setattr("fastgrad.features._CPU_WORKING_SET", 1)
    monkeypatch.setattr("fastgrad.features._CPU_SAMPLES", 2)
    _, pieces = Extraction(net, gradients)(x)
    assert list(pieces) == list(whole)
    for name, block in whole.items():
        # A product of a matrix with another number of rows may sum in another order: eps times the terms of a sum.
        torch.testing.assert_close(pieces[name], block, rtol=1e-12, atol=1e-12)
