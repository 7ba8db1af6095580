"""A network whose channels are read before its ReLU6 stays in ONNX Runtime's blocked layout, and gives the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from onnx_needed import WARNINGS, skip_without_onnx
from torch import Tensor, nn

from fastgrad.deploy import onnx_export, onnx_file
from fastgrad.ops.channel_moments import channel_square_sums

skip_without_onnx()
pytestmark = WARNINGS


class Mobile(nn.Module):
    """Inverted residuals; with the mean squares of what comes before each ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.project, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        squares = []
        for conv in (self.first, self.depthwise):
            x = conv(x)
            squares.append(channel_square_sums(x) / x[0, 0].numel())
            x = nn.functional.relu6(x)
        x = self.project(x)
        return self.head(x.mean((2, 3))), torch.cat([*squares, channel_square_sums(x)], 1)


def test_readings_before_a_clip_leave_images_in_blocks(tmp_path: Path) -> None:
    import onnx
    import onnxruntime as ort

    model = Mobile().eval()
    x = 8 * torch.randn(3, 3, 32, 32)
    proto = onnx_export.convert(model, x, outputs=("logits", "squares"))
    file, seen = tmp_path / "m.onnx", tmp_path / "optimized.onnx"
    onnx.save(proto, file)
    for found, expected in zip(onnx_file.load(file)(x), model(x), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)

    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(seen), 3
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(seen).graph.node)
    if "ReorderOutput" not in kinds:
        pytest.skip("this processor's convolutions have no blocks")
    # What leaves the blocks is one number a channel: of each of the three readings, and of the last mean.
    assert kinds["ReorderInput"] == 0
    assert kinds["Clip"] == 0
    assert kinds["ReorderOutput"] <= 4


@pytest.mark.parametrize("read", [False, True])
def test_only_a_clip_that_cannot_join_its_convolution_gets_one(read: bool) -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y = nn.functional.relu6(x).mean((2, 3))
            return y + x.mean((2, 3)) if read else y

    proto = onnx_export.convert(Clipped().eval(), torch.randn(2, 3, 8, 8), outputs=("y",))
    assert sum(node.op_type == "Conv" for node in proto.graph.node) == 1 + read
