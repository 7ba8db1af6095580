"""The command line: dispatch, errors, doctor and a small demo."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgrad.commands import cli, demo


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert "fastgrad" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--epochs", "0"], "fastgrad demo: epochs must be an integer of at least 1; it was 0"),
        (["demo", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["demo", "--seed", "-1"], "fastgrad demo: seed must be an integer of at least 0; it was -1"),
        (["demo", "--seed", str(2**64)], "fastgrad demo: seed must be below 2**32"),
        (["serve"], "the following arguments are required: model"),
        (["serve", "none.pt2"], "none.pt2 cannot be loaded: No such file"),
        (["score", "none.pt2", "."], "the following arguments are required: --out"),
        (["score", "none.pt2", ".", "--out", "o"], "none.pt2: there is no such file"),
    ],
)
def test_bad_calls_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_name_that_the_console_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cp1252, in which Windows writes to files and pipes: an error after the work would say that it failed."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    monkeypatch.setitem(cli.COMMANDS, "serve", (__name__, None, "help"))
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(add_arguments=id, run=lambda _: print("\u65e5") or 0))
    assert cli.main(["serve"]) == 0
    sys.stdout.flush()
    assert written.getvalue() == b"\\u65e5\n"


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "serve", ("no_such_package.command", "serve", "help"))
    assert cli.main(["serve"]) == 2
    message = "fastgrad serve: no_such_package is not installed; it comes with: pip install 'fastgrad[serve]'"
    assert message in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["implementations"]["float32"]["auto"] == "eager"
    assert "float32" in cpu["implementations"]["float64"]["why"]
    assert cli.main(["doctor"]) == 0
    assert "eager" in capsys.readouterr().out


def test_demo_writes_table_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_TRAINED", 600)
    monkeypatch.setattr(demo, "_FITTED", 300)
    monkeypatch.setattr(demo, "digits", lambda generator, load=demo.digits: [part[:1000] for part in load(generator)])
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), "--epochs", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1] == f"The figure: {(out / 'demo.png').resolve()}"
    text = (out / "demo.md").read_text("utf-8")
    assert text in printed
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    found = {name: [float(value) for value in values] for name, *values in rows[1:]}
    assert all(0 <= share <= 1 for shares in found.values() for share in shares)
    right, flagged, _, missed = found["digits"]
    assert missed <= 1 - right + 0.011
    # The detector finds what is unlike digits, and lets pass what nobody sees.
    assert found["photographs"][1] > 0.9
    for name in ("a grey level brighter", "a grey level darker", "contrast 1 % lower", "stored as bytes"):
        assert abs(found[name][1] - flagged) < 0.1, name
    assert float(text.removeprefix("Network: ").partition("%")[0]) > 50
    assert "logits, activations, image, roughness" in text
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_images_of_the_demo() -> None:
    images, labels = demo.digits(torch.Generator().manual_seed(0))
    assert images.shape == (1797, 1, 24, 24)
    assert labels.bincount(minlength=10).min() > 170
    for x in (images, demo.photographs(300)):
        assert x.shape[1:] == (1, 24, 24)
        assert 0 <= float(x.min()) < 0.1
        assert 0.9 < float(x.max()) <= 1
    assert torch.equal(demo.digits(torch.Generator().manual_seed(0))[1], labels)
