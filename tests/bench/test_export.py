"""The exported files' table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx_needed import skip_without_onnx
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("torchvision")

from bench.deploy import export
from fastgrad import TwoStageModel

skip_without_onnx()


def test_earlier_file_is_not_timed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(32, 4)).eval()

    def images(count: int, start: int) -> Tensor:
        return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(start))

    fitted = TwoStageModel(net, blocks=["logits"]).fit(images(40, 0), challenges=None)
    for case in ("plain", "default"):
        (tmp_path / f"small-{case}.onnx").write_bytes(b"of an earlier revision")
    how = {"runtimes": {"onnx": "ONNX Runtime"}, "batches": (2,), "least": 0.001}
    equal, *times = export.compared("small", net, fitted, images, tmp_path, **how)
    assert max(equal["logits"], equal["probabilities"], equal["uncertainty"]) < 1e-3
    assert [(row["case"], row["batch"]) for row in times] == [("plain", 2), ("default", 2)]
    assert times[0]["ratio"] == 1.0
