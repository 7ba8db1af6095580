"""What cannot be scored, and what `fastgrad score` says."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored import begin
from serve_client import image

from fastgrad.commands import cli
from fastgrad.commands import score as score_command
from fastgrad.deploy.score import job

Run = Callable[..., dict[str, int]]
COLUMNS = "image_column and key_column must be None for a folder; they were"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "nothing"}, "there are no images in"),
        ({"images": "none"}, "images must be a folder or a Parquet file; there is no"),
        ({"images": "other.pt2"}, "other.pt2 is not a readable Parquet file"),
        ({"images": None}, "images must be a path; it was None"),
        ({"image_column": "image"}, COLUMNS),
        ({"key_column": "id"}, COLUMNS),
        ({"model_path": "other.pt2"}, r"other\.pt2 is not a readable \.pt2"),
        ({"part": 0}, "part must be an integer of at least 1; it was 0"),
        ({"decoders": 0}, "decoders must be an integer of at least 1; it was 0"),
        ({"out": "no/o"}, "out must lie in an existing folder; there is no 'no'"),
        ({"out": "in.parquet"}, r"in\.parquet was not made by fastgrad score and is left as it is"),
        ({"out": "model.pt2"}, r"model\.pt2 was not made by fastgrad score and is left as it is"),
        ({"out": "nothing"}, "nothing was not made by fastgrad score and is left as it is"),
        ({"out": "photo.png"}, r"photo\.png was not made by fastgrad score and is left as it is"),
        ({"out": os.fsdecode(b"caf\xe9.parquet")}, "out must be a name in UTF-8, as pyarrow opens no other; it was '"),
    ],
)
def test_bad_arguments(
    change: dict[str, Any], message: str, run: Run, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"image": [image(0)]}), "in.parquet")
    shutil.copy(tiny_package, "model.pt2")
    Path("nothing").mkdir()
    Path("photo.png").write_bytes(image(1))
    Path("other.pt2").write_bytes(b"no model")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises((TypeError, ValueError), match=message):
        run(**change)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_model_without_images(tiny_package: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this model takes no images: its inputs have shape \(12,\)"):
        begin(tiny_package, tmp_path, tmp_path / "o.parts", input_shape=(12,), mean=None, std=None)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", ["pipe", "caf\udce9.txt", "part-caf\udce9.parquet"])
def test_files_that_pyarrow_cannot_open(name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o.parts").mkdir()
    for path in (tmp_path / "o.parts" / name, tmp_path / name):
        if name == "pipe":
            os.mkfifo(path)
            # It would wait for a writer.
            monkeypatch.setattr(job.pq, "read_schema", None)
        else:
            path.touch()
    for out in (tmp_path / "o", tmp_path / name):
        with pytest.raises(ValueError, match="was not made by fastgrad score"):
            run(out=out)


def test_command_line(
    folder: Path, tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ["score", str(tiny_package), str(folder), "--out", str(tmp_path / "o.parquet")]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert "23 images, 3 unreadable" in captured.out
    assert "23/23" in captured.err  # the progress bar
    assert cli.main([*command, "--workers", "2"]) == 2
    assert "--workers needs --ray" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        # Its own table is replaced.
        assert cli.main(command) == 0

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score_command, "score", stop)
    assert cli.main(command) == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
