"""The exported files' table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("torchvision")

from bench.deploy import export


def test_a_file_that_an_earlier_revision_left_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()

    def images(count: int, start: int) -> Tensor:
        return torch.rand(count, 3, 2, 2)

    monkeypatch.setattr(export, "network", lambda name, root, folder: (net, images, images(4, 0)))
    for name, value in {"FORMS": {}, "RUNTIMES": {"onnx": "ONNX Runtime"}, "BATCHES": (2,), "SECONDS": 0.001}.items():
        monkeypatch.setattr(export, name, value)
    (tmp_path / "linear-plain.onnx").write_bytes(b"of an earlier revision")
    (row,) = export.measure("linear", tmp_path, tmp_path)
    assert (row["case"], row["batch"], row["ratio"]) == ("plain", 2, 1.0)
