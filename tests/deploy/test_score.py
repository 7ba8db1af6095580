"""One row per image, whatever the image; runs that stop go on; and no file of others is touched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deploy_models import write_archive
from PIL import Image
from serve_client import image, many_scans, wait_for, warned_of

from fastgrad.commands import cli
from fastgrad.commands import score as score_command
from fastgrad.deploy.file.answer import answer, reason
from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import Description, ModelPackage
from fastgrad.deploy.score import Scorer, score

MISSING = "the file cannot be read: No such file or directory"
Run = Callable[..., dict[str, int]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty good images in two folders, three bad ones, one file that is no image."""
    base = tmp_path / "images"
    (base / "more").mkdir(parents=True)
    for i in range(20):
        place = base / "more" if i % 2 else base
        (place / f"{i:02d}.png").write_bytes(image(i, (8 + i, 9)))
    (base / "bad.jpg").write_bytes(b"not an image")
    (base / "empty.png").write_bytes(b"")
    (base / "short.PNG").write_bytes(image(0, (40, 40))[:100])
    (base / "notes.txt").write_text("no image")
    return base


@pytest.fixture
def run(folder: Path, tiny_onnx: Path, tmp_path: Path) -> Run:
    """Score these images into ``tmp_path / "o"`` in this process; options change that."""
    given = {"model_path": tiny_onnx, "images": folder, "out": tmp_path / "o", "workers": 0}
    return lambda **options: score(**{**given, **options})


def table(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def errors(path: Path) -> dict[str, str | None]:
    return {row["name"]: row["error"] for row in table(path)}


@pytest.mark.parametrize(("part", "workers"), [(1, 0), (7, 2), (100, 1)])
def test_one_row_per_image(part: int, workers: int, run: Run, folder: Path, model_file: Path, tmp_path: Path) -> None:
    # Black and white alone lie far out.
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 2, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels * 255).save(folder / f"odd {i}.png")
    counts = run(model_path=model_file, batch=4, part=part, workers=workers)
    rows, model = table(tmp_path / "o"), ModelPackage(model_file)
    names = [
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg")
    ]
    assert [row["name"] for row in rows] == sorted(names)
    for row in rows:
        if row["name"].split(".")[0] in ("bad", "empty", "short"):
            assert row.pop("error")
            assert set(row.values()) == {row["name"], None}
            continue
        x = decode_image((folder / row["name"]).read_bytes(), model.description)
        served = answer(model.description, model.description.threshold, model.rows(x[None])[0])
        assert row["probability"] == pytest.approx(served["probabilities"][row["class"]], rel=1e-5)
        for name in ("uncertainty", "evidence"):
            assert row[name] == pytest.approx(served[name], rel=1e-5, abs=1e-5)
        for name in ("class", "label", "risk", "reliable", "accepted", "alarm"):
            assert row[name] == served[name]
        assert row["error"] is None
        assert (row["alarm"] is None) == row["reliable"]
    unreliable = sum(row["reliable"] is False for row in rows)
    assert unreliable
    assert counts == {"images": 26, "unreadable": 3, "unreliable": unreliable, "continued": 0}
    assert [path.name for path in sorted((tmp_path / "o").iterdir())] == [
        f"part-{number:08d}.parquet" for number in range(-(-26 // part))
    ]


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [([1, 2, 0], "two"), ([1, 1.9, 0], "two; one"), ([2, 2, 2.1], "three; one"), ([0, 0, 0], None), ([], None)],
)
def test_reason(evidence: list[float], expected: str | None) -> None:
    words = {"a": "one", "b": "two", "c": "three"}
    assert reason(words, dict(zip(words, evidence, strict=False))) == expected


def test_images_in_parquet(run: Run, tmp_path: Path) -> None:
    contents, ids = [*(image(i) for i in range(30)), b"bad", bytes(5000)], [f"id {i}" for i in range(33)]
    contents.append(None)
    stored = {
        "bytes": pa.array(contents, pa.binary()),
        "large": pa.array(contents, pa.large_binary()),
        "struct": pa.array([{"bytes": c, "path": None} for c in contents]),
        "dictionary": pa.array(contents, pa.binary()).dictionary_encode(),
    }
    results = []
    for kind, cell in stored.items():
        source = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"id": ids, "image": cell, "other": list(range(33))}), source, row_group_size=5)
        counts = run(images=source, part=8, batch=3, max_bytes=1000, out=tmp_path / kind, workers=2)
        # More than the system can count is no limit.
        assert run(images=source, max_bytes=2**63, out=tmp_path / f"all {kind}")["unreadable"] == 3
        assert (counts["images"], counts["unreadable"]) == (33, 3)
        results.append(table(tmp_path / kind))
    assert all(result == results[0] for result in results)
    assert [row["name"] for row in results[0]] == ids
    assert [row["error"] for row in results[0][-2:]] == [
        "the image is too large; at most 1000 bytes are read", "the image is empty"
    ]  # fmt: skip


def test_odd_files(run: Run, tmp_path: Path) -> None:
    base, out = tmp_path / "odd", tmp_path / "o"
    (base / "closed").mkdir(parents=True)
    (base / "good.png").write_bytes(image(0))
    Path(os.fsdecode(os.fsencode(base) + b"/caf\xe9.png")).write_bytes(image(1))
    (base / "warned.png").write_bytes(warned_of())
    (base / "large.png").write_bytes(image(2, (60, 60)))
    (base / "old.tif").write_bytes(image(4, (8, 8), "TIFF"))
    (base / "broken.png").symlink_to("nowhere")
    (base / "link.png").symlink_to("good.png")
    (base / "folder.png").symlink_to("closed")
    (base / "device.png").symlink_to("/dev/zero")
    os.mkfifo(base / "pipe.png")
    run(images=base, max_bytes=9000, max_pixels=63)
    large = "the image is too large; at most 9000 bytes are read"
    assert errors(out)["large.png"] == large
    assert errors(out)["good.png"] == "the image has 8 x 8 pixels; at most 63 are allowed"
    run(images=base, out=tmp_path / "p", max_bytes=9000)
    good = dict.fromkeys((r"caf\xe9.png", "good.png", "link.png", "warned.png"))
    old = "the image cannot be read: it is none of JPEG, PNG, WEBP"
    assert errors(tmp_path / "p") == good | {"broken.png": MISSING, "large.png": large, "old.tif": old}


def test_file_that_changes_after_it_is_listed(run: Run, folder: Path, tmp_path: Path, tiny_onnx: Path) -> None:
    from fastgrad.deploy.dataset import Images

    images = Images(folder, Scorer(tiny_onnx).description, None, None, 10**7, 10**6)
    for number, (become, error) in enumerate(
        [
            (lambda path: os.mkfifo(path), "the file cannot be read: it is no regular file"),
            (lambda path: path.symlink_to("/dev/zero"), "the file cannot be read: it is no regular file"),
            (lambda path: None, MISSING),
            (lambda path: path.write_bytes(b"x" * 10**7), "the image is too large; at most 1000000 bytes are read"),
        ]
    ):
        victim = folder / f"{2 * number:02d}.png"
        victim.unlink()
        become(victim)
        assert images.__getitems__([number]) == [(victim.name, error)]


def test_limits_of_file_and_caller(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run(batch=10**6)["unreadable"] == 3
    assert run(max_pixels=71, out=tmp_path / "p")["unreadable"] == 23


def test_model_whose_results_are_not_finite(tiny_onnx: Path) -> None:
    scorer = Scorer(tiny_onnx)
    scorer.model.rows = lambda x: np.full((len(x), 7), np.nan)  # type: ignore[method-assign]
    rows = scorer([("a", np.zeros((3, 8, 8), np.uint8)), ("b", "unreadable")])
    assert [row["error"] for row in rows] == ["the model's result for this input is not a finite number", "unreadable"]


def test_stopped_run_goes_on(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    run(part=4)
    whole = table(out)
    for number in (1, 2, 4):
        (out / f"part-{number:08d}.parquet").unlink()
    (out / ".fastgrad-0123456789abcdef").write_bytes(b"what a killed run leaves")
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert run(part=4, batch=3, workers=2)["continued"] == 23 - 12
    assert [row["name"] for row in table(out)] == [row["name"] for row in whole]
    assert errors(out) == {row["name"]: row["error"] for row in whole}
    assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items())
    # A finished one has nothing to do.
    assert run(part=4)["continued"] == 23
    # Other options, images or models would mix two tables in one folder.
    other, touched = "is a part of another model, images or options", folder / "00.png"
    for options in ({"part": 5}, {"false_alarm_rate": 0.01}, {"max_pixels": 1000}):
        with pytest.raises(ValueError, match=other):
            run(**{"part": 4, **options})
    os.utime(touched, ns=(0, 0))
    with pytest.raises(ValueError, match=other):
        run(part=4)


def test_killed_run_goes_on(folder: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """SIGKILL, at once for all its processes: what is there is whole, and the rest is done by the same command."""
    for i in range(400):
        (folder / f"k{i:03d}.png").write_bytes(image(i, (200, 200)))
    out = tmp_path / "o"
    command = [sys.executable, "-m", "fastgrad", "score", tiny_onnx, folder, "--out", out, "--part", "20"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob("part-*"))) >= 3 or process.poll() is not None, 60)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = [pq.read_table(path).num_rows for path in sorted(out.glob("part-*"))]
    assert 3 <= len(kept) < 22
    assert set(kept) <= {20, 3}
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(rf"423 images, 3 unreadable, \d+ unreliable, {sum(kept)} continued", done.stdout)
    names = [row["name"] for row in table(out)]
    assert names == sorted(names)
    assert len(set(names)) == 423


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "nothing"}, "images must hold at least one; there are none in"),
        ({"images": "none"}, "images must be a folder or a Parquet file; there is no"),
        ({"images": "other.pt2"}, "images must be a folder or a Parquet file; .*other.pt2 is none"),
        ({"images": None}, "images must be a path; it was None"),
        ({"image_column": "image"}, "image_column and key_column must be None for a folder; they were"),
        ({"model_path": "other.pt2"}, r"other\.pt2 is not a readable \.pt2"),
        ({"part": 0}, "part must be an integer of at least 1; it was 0"),
        ({"workers": -1}, "workers must be an integer of at least 0; it was -1"),
        ({"out": "no/o"}, "out must be a folder, or a new one in an existing folder; it was 'no/o'"),
        ({"out": "other.pt2"}, "out must be a folder, or a new one in an existing folder; it was 'other.pt2'"),
        ({"out": "taken"}, r"taken/part-1\.parquet' is no part of this program"),
        ({"out": os.fsdecode(b"caf\xe9")}, "out must be a name in UTF-8, as pyarrow opens no other; it was '"),
    ],
)
def test_bad_arguments(
    change: dict[str, Any], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "taken"):
        Path(name).mkdir()
    Path("taken/part-1.parquet").write_text("the only copy")
    Path("other.pt2").write_bytes(b"no model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises((TypeError, ValueError), match=message):
        run(**change)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_model_without_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_archive(tmp_path / "m.pt2", Description((12,), "float32", 4, 8, "cpu"))
    monkeypatch.setattr("fastgrad.deploy.file.package._load_archive", lambda path: None)
    with pytest.raises(ValueError, match=r"this model takes no images: its inputs have shape \(12,\)"):
        Scorer(path)


def test_image_that_takes_long(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jpg").write_bytes(many_scans(5000, 3000))
    monkeypatch.setattr("fastgrad.deploy.dataset.MAX_SECONDS", 0.1)
    run(images=tmp_path / "one")
    assert errors(tmp_path / "o") == {"a.jpg": "decoding the image takes more than 0.1 s"}


def test_command_line(
    folder: Path, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ["score", str(tiny_onnx), str(folder), "--out", str(tmp_path / "o"), "--workers", "0"]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert "23 images, 3 unreadable" in captured.out
    assert "23/23" in captured.err  # the progress bar
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert cli.main(command) == 0

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score_command, "score", stop)
    assert cli.main(command) == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
