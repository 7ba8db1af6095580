"""Graphs have few operators, which ONNX Runtime computes in blocks, and give the numbers that they gave before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_needed import WARNINGS, skip_without_onnx
from torch import Tensor, nn

from fastgrad.deploy.file import onnx_export, onnx_file

skip_without_onnx()
pytestmark = WARNINGS


def written(
    model: Callable[[Tensor], Any], x: Tensor, outputs: tuple[str, ...], folder: Path
) -> tuple[Path, Counter[str]]:
    """A file that answers as ``model`` does, with the rounding of sums of few terms, and its operators."""
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
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.norms[0](self.first(x))
        second = self.norms[1](self.depthwise(nn.functional.relu6(first)))
        grids = [nn.functional.max_pool2d(value, 1, (8, 7)) for value in (first, second)]
        return nn.functional.relu6(second), torch.cat([grid.flatten(1) for grid in grids], 1)


def test_grid_gets_its_own_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {size: Gridded(32).eval() for size in (64, 65, 79)}

    def crops(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for size, model in models.items() for value in model(x[..., :size, : size - 3]))

    names = tuple(f"{name} {size}" for size in models for name in ("map", "grids"))
    file, kinds = written(crops, 8 * torch.randn(3, 3, 79, 76), names, tmp_path)
    assert (kinds["Conv"], kinds["MaxPool"]) == (4 * len(models), 0)
    assert optimized(file, tmp_path)["Clip"] == 0


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return torch.relu(x), nn.functional.max_pool2d(x, 1, 2)


def test_expensive_grid_reads_the_map(tmp_path: Path) -> None:
    assert written(Dense().eval(), torch.randn(2, 64, 8, 8), ("y", "grid"), tmp_path)[1]["Conv"] == 1


def means(x: Tensor) -> tuple[Tensor, ...]:
    """With another divisor."""
    pooled = nn.functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False, divisor_override=2)
    return pooled, nn.functional.avg_pool3d(x[:, None], 2, divisor_override=3)


def turns(x: Tensor) -> tuple[Tensor, ...]:
    """Tensors that are written."""
    y, z = torch.empty_like(x), x.clone()
    y[:, ::2], y[:, 1::2] = -x[:, 1::2], x[:, ::2]
    z[:, 1:3], z[:, 5], z[:, 6:] = 0, 1.5, x[:, :1]
    return y, z


def masks(x: Tensor) -> tuple[Tensor, ...]:
    """Numbers less integers, as language models make of a mask what is added to attention."""
    mask = (x > 0).long()
    return 1.0 - mask, 1 - mask, torch.rsub(mask, 0.5, alpha=2)


BOUNDS = [(0, 0.5), (0.25, 1), (-1.5, -1), (1, 0.5), (-1, 1), (None, 0.5), (-0.5, None), (0, None)]


def bounds(x: Tensor) -> tuple[Tensor, ...]:
    """Of other types than what they bound."""
    clamped = [(x.clamp(low, high), (4 * x).int().clamp(low, high).float()) for low, high in BOUNDS]
    return tuple(value for pair in clamped for value in pair)


def test_translations(tmp_path: Path) -> None:
    """In one graph, as each takes a second to translate."""
    numbers = torch.tensor([[-1.2, -0.3, 0.3, 0.7, 1.2]] * 3)
    x = torch.cat([numbers, torch.arange(1152.0).sin().view(3, -1)], 1)

    def all_of_them(x: Tensor) -> tuple[Tensor, ...]:
        numbers, rest = x[:, :5], x[:, 5:]
        return *bounds(numbers), *turns(rest[:, :8]), *masks(rest[:, :4]), *means(rest.reshape(-1, 4, 8, 12))

    written(all_of_them, x, tuple(f"y{i}" for i in range(len(all_of_them(x)))), tmp_path)


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
