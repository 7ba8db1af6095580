"""``fastgrad fit``: a folder of images becomes a file that answers; bad networks and folders are named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_needed import WARNINGS, skip_without_onnx
from PIL import Image

import fastgrad
from fastgrad.commands import cli
from fastgrad.deploy.file.package import ModelPackage

pytestmark = WARNINGS

MODULE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 2))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_to_fit.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "clean" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "clean" / name / f"{i}.png")
    return tmp_path / "clean"


def test_a_folder_becomes_a_file_that_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without_onnx()
    (folder / "cat" / "notes.txt").write_text("no image")
    assert cli.main(["fit", "mine_to_fit:network", str(folder), "-o", "model.onnx", "--size", "16"]) == 0
    printed = capsys.readouterr()
    assert "notes.txt is left out" in printed.err
    assert "threshold 3.00" in printed.out
    package = ModelPackage("model.onnx")
    assert list(package.description.labels) == ["cat", "dog"]
    assert package(torch.zeros(2, 3, 16, 16)).risk.shape == (2,)


@pytest.mark.parametrize(
    ("network", "message"),
    [("mine_to_fit", "must be MODULE:FUNCTION"), ("mine_to_fit:other", "must name a function that can be imported")],
)
def test_bad_networks_are_named(folder: Path, network: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", network, str(folder), "-o", "model.onnx"]) == 2
    assert message in capsys.readouterr().err


def test_images_that_the_network_does_not_take_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "fit",
        "mine_to_fit:network",
        str(folder),
        "-o",
        "model.onnx",
        "--size",
        "16",
        "--mean",
        "0.5",
        "--std",
        "0.5",
    ]
    assert cli.main(words) == 2
    assert "network must take images (1, 1, 16, 16), as --size and --mean give; it raised: " in capsys.readouterr().err


def test_a_folder_of_other_classes_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cow").mkdir()
    assert cli.main(["fit", "mine_to_fit:network", str(folder), "-o", "model.onnx", "--size", "16"]) == 2
    assert "one folder for each of the 2 classes; it holds 3" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["model.bin", "no/such/folder/model.onnx", "missing extra"])
def test_unwritable_file_is_refused_before_the_fit(
    out: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = {"model.bin": "path must end in", "missing extra": "pip install 'fastgrad[onnx]'"}.get(out, "existing")
    if out == "missing extra":
        skip_without_onnx()
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        out = "model.onnx"
    monkeypatch.setattr(fastgrad.TwoStageModel, "fit", lambda *a, **k: pytest.fail("fitted before the path was read"))
    assert cli.main(["fit", "mine_to_fit:network", str(folder), "-o", out, "--size", "16"]) == 2
    assert message in capsys.readouterr().err
