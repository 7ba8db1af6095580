"""Files that version 0.1 stored still load, and answer as they did then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgrad import TwoStageModel

STORED = Path(__file__).parent / "data" / "stored-0.1"


class Net(nn.Module):
    """The network that the files were stored with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("form", ["signals", "contrasts", "last_layer"])
def test_a_stored_model_answers_as_it_did(form: str) -> None:
    expected = load_file(STORED / "expected.safetensors")
    network = Net().eval()
    network.load_state_dict({k.removeprefix("model."): v for k, v in expected.items() if k[:6] == "model."})
    answer = TwoStageModel.load(STORED / f"{form}.safetensors", network)(expected["input"])
    for name in ("logits", "probabilities", "uncertainty"):
        stored = expected[f"{form}.{name}"]
        # Another machine's float32 convolutions round otherwise; the detector's map is at most some 1e2 steep.
        torch.testing.assert_close(getattr(answer, name), stored, rtol=1e-4, atol=1e-4)
