"""Grids of positions and backward passes are what they were, in operators that ONNX Runtime computes in blocks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from onnx_needed import WARNINGS, skip_without_onnx
from torch import Tensor, nn

from fastgrad.deploy.file import onnx_export, onnx_file, onnx_operators

skip_without_onnx()
pytestmark = WARNINGS


def written(model: nn.Module, x: Tensor, outputs: tuple[str, ...], folder: Path) -> tuple[Path, Counter[str]]:
    """A file that answers as ``model`` does, whose sums have few terms, and its operators."""
    import onnx

    proto = onnx_export.convert(model, x, outputs=outputs)
    onnx.save(proto, file := folder / "m.onnx")
    for found, expected in zip(onnx_file.load(file)(x), model(x), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    return file, Counter(node.op_type for node in proto.graph.node)


class Gridded(nn.Module):
    """A grid of positions of what comes before each activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, 2, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])
        for norm in self.norms:
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.norms[0](self.first(x))
        second = self.norms[1](self.depthwise(nn.functional.relu6(first)))
        grids = [nn.functional.max_pool2d(value, 1, (8, 7)) for value in (first, second)]
        return nn.functional.relu6(second), torch.cat([grid.flatten(1) for grid in grids], 1)


@pytest.mark.parametrize("size", [64, 65, 79])
def test_a_grid_of_positions_gets_a_convolution_of_its_own(size: int, tmp_path: Path) -> None:
    torch.manual_seed(size)
    x = 8 * torch.randn(3, 3, size, size - 3)
    file, kinds = written(Gridded(32).eval(), x, ("map", "grids"), tmp_path)
    assert (kinds["Conv"], kinds["MaxPool"]) == (4, 0)
    assert optimized(file, tmp_path)["Clip"] == 0


def test_a_grid_that_costs_more_than_the_map_is_read_from_the_map() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return torch.relu(x), nn.functional.max_pool2d(x, 1, 2)

    proto = onnx_export.convert(Dense().eval(), torch.randn(2, 64, 8, 8), outputs=("y", "grid"))
    assert Counter(node.op_type for node in proto.graph.node)["Conv"] == 1


class Back(nn.Module):
    """The sums of gradients at four layers, sent back through convolutions of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1),
                nn.Conv2d(64, 32, 3, padding=2, dilation=2, groups=2), nn.Conv2d(32, 32, 3, padding=0),
            ]
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = self.stem(x)
            first = x = x.detach().requires_grad_()
            outputs = [first]
            for number, layer in enumerate(self.layers):
                outputs.append(x := layer(x))
                x = torch.relu(x) if number % 2 else nn.functional.relu6(x)
            return torch.cat([g.sum((2, 3)) for g in torch.autograd.grad(x.square().sum(), outputs)], 1)


def test_a_backward_pass_has_convolutions_and_steps_alone(tmp_path: Path) -> None:
    import onnx

    torch.manual_seed(0)
    model = Back().eval()
    # Of few bits, so that no order of summation rounds, and none puts a number on the other side of an edge.
    for parameter in model.parameters():
        parameter.data.copy_(torch.randint(-2, 3, parameter.shape) / 2)
    x = torch.randint(-4, 5, (3, 3, 24, 24)).float()
    proto = onnx_export.convert(model, x, outputs=("sums",))
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds["ConvTranspose"] == kinds["Where"] == 0
    onnx.save(proto, file := tmp_path / "m.onnx")
    (found,), expected = onnx_file.load(file)(x), model(x)
    # Of sums of up to 144 products of up to 288 terms each, rounded otherwise.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=float(1e-5 * expected.abs().max()))


@pytest.mark.parametrize("edge", [0.0, 6.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_is_a_comparison(sign: float, edge: float) -> None:
    near = torch.tensor([edge]).nextafter(torch.tensor([-10.0, 10.0]))
    x = torch.cat([near, torch.tensor([edge, -3e38, 3e38, 1.0, -1e-20, 1e-20])]).view(1, 1, 2, 4).repeat(1, 2, 1, 1)
    if edge == 0:  # numbers beside zero are too small to be a gradient's doing
        x[..., 0, :2] *= 2.0**60
    expected = (sign * (x - edge) > 0).float()
    torch.testing.assert_close(onnx_operators._above(x, sign, edge), expected, rtol=0, atol=0)


def optimized(file: Path, folder: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime makes of a file on this processor."""
    import onnx
    import onnxruntime as ort

    options, seen = ort.SessionOptions(), folder / "optimized.onnx"
    options.optimized_model_filepath, options.log_severity_level = str(seen), 3
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(seen).graph.node)
    if "ReorderOutput" not in kinds:
        pytest.skip("this processor's convolutions have no blocks")
    return kinds
