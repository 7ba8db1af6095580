"""The optimizer leaves few operators, and the numbers that they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx_needed import WARNINGS, skip_without_onnx
from torch import Tensor, nn

from fastgrad.deploy.file import onnx_export, onnx_file, onnx_optimizer

skip_without_onnx()
pytestmark = WARNINGS


class Wasteful(nn.Module):
    """Zeros on two sides, a clip in two steps, constants that can be computed, reshapes of reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(nn.functional.pad(x, (0, 1, 0, 1)))
        x = torch.minimum(torch.maximum(x, torch.zeros(())), torch.full((), 6.0))
        x = x * (torch.arange(8.0).square().sum() / 140).view(1, 1, 1, 1)
        x = x.reshape(x.shape[0], 8, -1).reshape(x.shape[0], 8, 4, -1)
        return self.head(x.transpose(2, 3).transpose(2, 3).mean((2, 3)))


def test_operators_are_joined(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Wasteful().eval(), torch.randn(5, 3, 8, 8)
    proto = onnx_export.convert(model, x, outputs=("logits",))
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Conv") == kinds.count("Clip") == 1
    assert not {"Pad", "Transpose", "Shape", "Min", "Max", "Identity", "Constant"}.intersection(kinds)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    run = onnx_file.load(tmp_path / "m.onnx")
    for rows in (x, x[:1], x[:2]):
        (found,) = run(rows)
        # 27 products of a convolution, 16 of a mean and 8 of a row, each rounded once.
        bound = 60 * torch.finfo(torch.float32).eps * found.abs().max()
        assert (found - model(rows)).abs().max() <= bound


@pytest.mark.parametrize("name", onnx_optimizer._RULES)
def test_rules_look_at_the_nodes_before_one_node(name: str) -> None:
    """A pattern that ends in two nodes would be looked for among all pairs."""
    from onnxscript.rewriter.rules import common

    rule = getattr(common, name, None)
    if rule is None:
        pytest.skip("a rule of newer versions")
    assert rule._target_pattern.has_single_output_node
