"""One row per image, whatever the image: what it says, and what becomes of images that cannot be read."""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scored import errors, table
from serve_client import image, many_scans, warned_of

from fastgrad.deploy.file import package
from fastgrad.deploy.file.answer import answer, reason
from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import ModelPackage, read_description
from fastgrad.deploy.score import job

Run = Callable[..., dict[str, int]]
MISSING = "the file cannot be read: No such file or directory"
NO_FILE = "the file cannot be read: it is no regular file"


@pytest.mark.parametrize("part", [1, 7, 100])
def test_one_row_per_image(part: int, run: Run, folder: Path, model_file: Path, tmp_path: Path) -> None:
    # Black and white alone lie far out.
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 2, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels * 255).save(folder / f"odd {i}.png")
    counts = run(model_path=model_file, batch=4, part=part)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "o"]


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
    cells = {
        "bytes": pa.array(contents, pa.binary()),
        "large": pa.array(contents, pa.large_binary()),
        "struct": pa.array([{"bytes": c, "path": None} for c in contents]),
        "dictionary": pa.array(contents, pa.binary()).dictionary_encode(),
    }
    results = []
    for kind, cell in cells.items():
        source = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"id": ids, "image": cell, "other": list(range(33))}), source, row_group_size=5)
        counts = run(images=source, part=8, max_bytes=1000)
        assert (counts["images"], counts["unreadable"]) == (33, 3)
        results.append(table(tmp_path / "o"))
    assert all(result == results[0] for result in results)
    assert [row["name"] for row in results[0]] == ids
    assert [row["error"] for row in results[0][-2:]] == [
        "the image is too large; at most 1000 bytes are read", "the image is empty"
    ]  # fmt: skip
    # More than the system can count is no limit.
    assert run(images=source, max_bytes=2**63)["images"] == 33


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes pipes")
@pytest.mark.parametrize(
    ("become", "error"),
    [
        (lambda path: os.mkfifo(path), NO_FILE),
        (lambda path: path.symlink_to("/dev/zero"), NO_FILE),
        (lambda path: None, MISSING),
        (lambda path: path.write_bytes(many_scans(101)), "the image has more than 100 scans"),
    ],
    ids=["a pipe", "a device", "gone", "many scans"],
)
@pytest.mark.parametrize("late", [True, False], ids=["after it is listed", "while it is listed"])
def test_file_becomes_something_else(
    become: Callable[[Path], Any], error: str, late: bool,
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    victim, listed, walk = folder / "04.png", job.list_folder, os.walk

    def change() -> None:
        victim.unlink()
        become(victim)

    def after(*args: Any) -> Any:
        found = listed(*args)
        change()
        return found

    def during(*args: Any, **options: Any) -> Any:
        yield from [*walk(*args, **options)]
        change()

    if late:
        monkeypatch.setattr(job, "list_folder", after)
    else:
        monkeypatch.setattr(os, "walk", during)
    run()
    # What is no regular file when it is listed is no image.
    assert errors(tmp_path / "o").get("04.png") == (error if late or error != NO_FILE else None)
    assert len(errors(tmp_path / "o")) == (23 if late or error != NO_FILE else 22)


def test_odd_files(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = tmp_path / "odd", tmp_path / "o"
    (base / "closed").mkdir(parents=True)
    (base / "good.png").write_bytes(image(0))
    Path(os.fsdecode(os.fsencode(base) + b"/caf\xe9.png")).write_bytes(image(1))
    (base / "large.png").write_bytes(image(2, (60, 60)))
    (base / "old.tif").write_bytes(image(4, (8, 8), "TIFF"))
    (base / "broken.png").symlink_to("nowhere")
    (base / "link.png").symlink_to("good.png")
    (base / "folder.png").symlink_to("closed")
    with monkeypatch.context() as patch:
        patch.setattr(job, "MAX_SECONDS", 0.0)
        run(images=base, max_bytes=9000)
    assert set(errors(out).values()) == {"decoding the image takes more than 0 s", MISSING,
                                   "the image is too large; at most 9000 bytes are read"}  # fmt: skip
    run(images=base)
    good = dict.fromkeys((r"caf\xe9.png", "good.png", "large.png", "link.png"))
    old = "the image cannot be read: it is none of JPEG, PNG, WEBP"
    assert errors(out) == good | {"broken.png": MISSING, "old.tif": old}
    monkeypatch.setattr(ModelPackage, "rows", lambda _, x: np.full((len(x), 7), np.nan))
    run(images=base)
    assert errors(out)["good.png"] == "the model's result for this input is not a finite number"


def test_limits_of_file_and_caller(run: Run, tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(read_description(tiny_package), max_batch=3)
    monkeypatch.setattr(package, "read_description", lambda path: small)
    assert run()["unreadable"] == 3
    assert run(max_pixels=71)["unreadable"] == 23


def test_table_is_no_image(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for out in (folder / "table.png", Path("table.png"), Path("more") / ".." / "table.png"):
        assert run(out=out)["images"] == 23


def test_decoding_beside_the_network(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    running, decoding, numbers = threading.Event(), threading.Event(), itertools.count()
    rows, decode = ModelPackage.rows, job.decode_pixels

    def slow(self: ModelPackage, x: Any) -> Any:
        running.set()
        # The first batch waits for an image of a later one; without one at work it would wait in vain.
        assert decoding.wait(20)
        return rows(self, x)

    def watched(*args: Any, **options: Any) -> Any:
        # The first batch has two images; the third is not decoded before that batch runs.
        if next(numbers) >= 2:
            assert running.wait(20)
            decoding.set()
        return decode(*args, **options)

    monkeypatch.setattr(ModelPackage, "rows", slow)
    monkeypatch.setattr(job, "decode_pixels", watched)
    run(batch=2, decoders=1)
    assert decoding.is_set()


def test_warnings_come_back(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, over, numbers = threading.Event(), threading.Event(), itertools.count()
    open_image, decode, before = Image.open, job.decode_pixels, list(warnings.filters)

    def together(*args: Any, **options: Any) -> Any:
        # The first image is opened before the second, and has been read before it.
        if next(numbers) == 0:
            assert inside.wait(20)
        else:
            inside.set()
            assert over.wait(20)
        return open_image(*args, **options)

    def watched(*args: Any, **options: Any) -> Any:
        try:
            return decode(*args, **options)
        finally:
            over.set()

    (tmp_path / "two").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "two" / name).write_bytes(warned_of())
    monkeypatch.setattr(Image, "open", together)
    monkeypatch.setattr(job, "decode_pixels", watched)
    # Pillow warns of both, which is an error in these tests, and none of the images.
    assert run(images=tmp_path / "two", decoders=2)["unreadable"] == 0
    assert warnings.filters == before
