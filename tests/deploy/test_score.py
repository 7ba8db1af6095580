from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from python_process import run_python
from serve_client import image, many_scans, warned_of

from fastgrad.commands import cli
from fastgrad.commands import score as score_command
from fastgrad.deploy.file import images, package
from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import ModelPackage, PackageError, read_description
from fastgrad.deploy.score import job, sources
from fastgrad.deploy.score import local as score_module
from fastgrad.deploy.score.local import score
from fastgrad.deploy.score.sources import read_parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

#: Of a job.
OPTIONS: dict[str, Any] = {"batch": 4, "false_alarm_rate": None, "max_pixels": 100, "max_bytes": 10**6}
COLUMNS = (None, None)


def begin(model: Path, images: Path, folder: Path, part: int = 4, **changes: Any) -> job.Job:
    """A job whose parts lie in this folder; the description may be changed."""
    description = dataclasses.replace(read_description(model), **changes)
    return job.Job(model, description, images, folder, folder.with_suffix(""), part=part, columns=COLUMNS, **OPTIONS)


def table(path: Any) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


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


def check(rows: list[dict], folder: Path, package: Path) -> None:
    model = ModelPackage(package)
    assert [row["name"] for row in rows] == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg")
    )
    for row in rows:
        content = (folder / row["name"]).read_bytes()
        if row["name"].split(".")[0] in ("bad", "empty", "short"):
            assert row["error"]
            assert row["class"] is row["uncertainty"] is row["reliable"] is None
            continue
        direct = model(decode_image(content, model.description)[None])
        assert row["error"] is None
        assert row["class"] == int(direct.probabilities.argmax())
        assert row["label"] == model.description.labels[row["class"]]
        assert row["uncertainty"] == pytest.approx(float(direct.uncertainty), rel=1e-5, abs=1e-5)
        assert row["reliable"] == (row["uncertainty"] <= model.description.threshold)
        assert row["evidence"] is row["alarm"] is None


@pytest.mark.parametrize("part", [1, 7, 100])
def test_one_row_an_image_whatever_the_image(folder: Path, model_file: Path, tmp_path: Path, part: int) -> None:
    out = tmp_path / "scores.parquet"
    counts = score(model_file, folder, out, batch=4, part=part)
    rows = table(out)
    check(rows, folder, model_file)
    assert counts["images"] == 23
    assert counts["unreadable"] == 3
    assert counts["unreliable"] == sum(row["reliable"] is False for row in rows)
    assert counts["continued"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "scores.parquet"]


def test_a_row_says_what_the_server_answers(folder: Path, tiny_explained: Path, tmp_path: Path) -> None:
    from PIL import Image

    from fastgrad.deploy.file.answer import answer

    for i in range(20):
        # Black and white alone, which lie far out.
        pixels = 255 * np.random.default_rng(i).integers(0, 2, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"harsh-{i:02d}.png")
    out = tmp_path / "scores.parquet"
    score(tiny_explained, folder, out, part=7)
    rows = table(out)
    model = ModelPackage(tiny_explained)
    for row in rows:
        if row["error"]:
            assert row["evidence"] is row["alarm"] is None
            continue
        x = decode_image((folder / row["name"]).read_bytes(), model.description)
        (values,) = model.rows(x[None])
        served = answer(model.description, model.description.threshold, values)
        assert row["risk"] is served["risk"] is None
        assert row["evidence"] == pytest.approx(served["evidence"], rel=1e-5, abs=1e-5)
        assert row["alarm"] == served["alarm"]
        assert (row["alarm"] is None) == row["reliable"]
    assert any(row["alarm"] for row in rows)


def test_a_reason_is_the_fewest_parts_that_hold_two_thirds() -> None:
    from fastgrad.deploy.file.answer import reason

    words = {"a": "one", "b": "two", "c": "three"}
    assert reason(words, {"a": 1.0, "b": 2.0, "c": 0.0}) == "two"
    assert reason(words, {"a": 1.0, "b": 1.9, "c": 0.0}) == "two; one"
    assert reason(words, {"a": 2.0, "b": 2.0, "c": 2.1}) == "three; one"
    assert reason(words, {"a": 0.0, "b": 0.0, "c": 0.0}) is None
    assert reason({}, {}) is None


def test_parquet_input(tiny_package: Path, tmp_path: Path) -> None:
    contents = [image(i) for i in range(30)] + [b"bad", None]
    ids = [f"id {i}" for i in range(32)]
    cells = {
        "bytes": pa.array(contents, pa.binary()),
        "struct": pa.array([{"bytes": c, "path": None} for c in contents]),
        "dictionary": pa.array(contents, pa.binary()).dictionary_encode(),
    }
    results = []
    for kind, cell in cells.items():
        source, out = tmp_path / f"{kind}.parquet", tmp_path / f"{kind}.out"
        pq.write_table(pa.table({"id": ids, "image": cell, "other": list(range(32))}), source, row_group_size=5)
        counts = score(tiny_package, source, out, part=8)
        assert counts == {**counts, "images": 32, "unreadable": 2}
        results.append(table(out))
    assert all(result == results[0] for result in results)
    assert [row["name"] for row in results[0]] == ids


def test_a_range_of_rows_is_the_same_range(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"img": [bytes([i]) for i in range(200)]}), source, row_group_size=70)
    everything = [item.content for item in read_parquet(source, None, None)]
    assert everything == [bytes([i]) for i in range(200)]
    for start, stop in ((0, 1), (69, 71), (70, 140), (63, 200), (199, 200), (5, 5)):
        found = list(read_parquet(source, None, None, start, stop))
        assert [item.content for item in found] == everything[start:stop]
        assert [item.name for item in found] == [str(i) for i in range(start, stop)]


def test_a_damaged_page_is_said_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"img": [os.urandom(50) for _ in range(200)]}), path, row_group_size=100)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} is damaged in or after row (64|100): "):
        list(read_parquet(path, None, None))


def test_keys_of_any_type_are_names(tmp_path: Path) -> None:
    keys = {"binary": [b"k0", None, b"\xff"], "text": ["k0", None, "\\xff"], "number": [7, None, 9]}
    # Other programs write texts that are no UTF-8.
    keys["latin"] = pa.array(keys["binary"], pa.binary()).view(pa.string())
    names = {key: ["k0", "1", "\\xff"] for key in ("binary", "text", "latin")} | {"number": ["7", "1", "9"]}
    pq.write_table(pa.table({"img": [b""] * 3, **keys}), tmp_path / "in.parquet")
    for key, expected in names.items():
        assert [item.name for item in read_parquet(tmp_path / "in.parquet", None, key)] == expected


def test_an_interrupted_run_goes_on_and_repeats_nothing(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts, plain = (tmp_path / "scores.parquet", tmp_path / "scores.parquet.parts", job.write_part)
    written: list[str] = []

    def stopping(rows, path, *more):
        if len(written) == 2 and not out.with_suffix(".go").exists():
            raise KeyboardInterrupt
        written.append(path.name)
        plain(rows, path, *more)

    monkeypatch.setattr(job, "write_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        score(tiny_package, folder, out, batch=2, part=4)
    assert not out.exists()
    out.with_suffix(".go").touch()
    # Other options would mix two jobs in one file, and so would other images of the same names.
    with pytest.raises(ValueError, match="another job"):
        score(tiny_package, folder, out, batch=2, part=5)
    touched = folder / "00.png"
    before = touched.stat()
    os.utime(touched, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="another job"):
        score(tiny_package, folder, out, batch=2, part=4)
    os.utime(touched, ns=(before.st_atime_ns, before.st_mtime_ns))
    # A part that another job wrote, and one that is none, are not taken for this one's.
    pq.write_table(pq.read_table(parts / "part-00000000.parquet").replace_schema_metadata({}), parts / "x")
    os.replace(parts / "x", parts / "part-00000000.parquet")
    (parts / "part-00000003.parquet").write_bytes(b"torn")
    # A process that was killed while it wrote has left what it had.
    (parts / ".fastgrad-0123456789abcdef").write_bytes(b"torn")
    counts = score(tiny_package, folder, out, batch=2, part=4)
    assert counts["continued"] == 4
    assert written == [f"part-{i:08d}.parquet" for i in (0, 1, 0, 2, 3, 4, 5)]
    check(table(out), folder, tiny_package)
    assert not parts.exists()


def test_a_slower_run_writes_nothing_beside_parts_that_go(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain, late = tmp_path / "o.parquet", Path.unlink, []

    def unlink(path: Path, *more: Any, **options: Any) -> None:
        if path.name == "part-00000001.parquet":
            with pytest.raises(FileNotFoundError):
                job.write_part([], tmp_path / "o.parquet.parts" / "part-00000000.parquet", pa.schema([]), "slower")
            late.append(path)
        plain(path, *more, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    score(tiny_package, folder, out, part=4)
    assert len(late) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "o.parquet"]


def test_what_is_not_finished_lies_in_the_folder_of_the_job(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed there, it is removed by the run that goes on; beside the output nothing would ever remove it."""
    places, plain = [], pq.ParquetWriter

    def writer(path: Path, *more: Any) -> Any:
        places.append(path.parent.name)
        return plain(path, *more)

    monkeypatch.setattr(job.pq, "ParquetWriter", writer)
    score(tiny_package, folder, tmp_path / "o.parquet")
    assert places[-1] == "o.parquet.parts"


@pytest.mark.parametrize("at", [0, 2, 4])
def test_of_two_runs_at_once_the_later_says_so(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    out, plain, counts = tmp_path / "o.parquet", job.Job.write, []

    def write(self, model, index, *more):
        if index == at:
            monkeypatch.setattr(job.Job, "write", plain)
            counts.append(score(tiny_package, folder, out, part=4))
        return plain(self, model, index, *more)

    monkeypatch.setattr(job.Job, "write", write)
    with pytest.raises(ValueError, match=r"o\.parquet\.parts was removed meanwhile, as by another run with this out"):
        score(tiny_package, folder, out, part=4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("o")] == ["o.parquet"]
    assert pq.read_table(out).num_rows == counts[0]["images"]


def test_of_two_jobs_with_one_folder_the_later_does_not_begin(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tmp_path / "o.parts"
    first = begin(tiny_package, folder, parts)
    monkeypatch.chdir(tmp_path)
    assert begin(tiny_package, Path("images"), parts).id == first.id
    # The first has no part yet.
    with pytest.raises(ValueError, match=r"o\.parts holds the parts of another job"):
        begin(tiny_package, folder, parts, 5)
    # Nor a claim, where parts were copied by their names.
    (claim,) = first.folder.iterdir()
    claim.unlink()
    job.write_part([], first.paths[0], first.schema, first.id)
    with pytest.raises(ValueError, match=r"o\.parts holds the parts of another job"):
        begin(tiny_package, folder, parts, 5)
    first.paths[0].unlink()
    assert score(tiny_package, folder, tmp_path / "o", part=4, **OPTIONS)["images"] == 23
    assert not list(tmp_path.glob("o.parts*"))


def test_a_part_that_comes_while_the_folder_is_looked_at_is_no_other_jobs(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, plain, parts = itertools.count(), job._schema, tmp_path / "o.parts"
    first = begin(tiny_package, folder, parts, 9)
    job.write_part([], first.paths[0], first.schema, first.id)
    monkeypatch.setattr(job, "_schema", lambda path: plain(path) if next(looks) >= len(first.paths) else pa.schema([]))
    assert begin(tiny_package, folder, parts, 9).missing == [0, 1, 2]


def test_parts_of_another_job_are_not_joined(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "o.parquet", score_module.join_parts

    def join(done: job.Job, *more: Any) -> None:
        # One that was ended meanwhile, and begun anew with another model.
        part = done.paths[1]
        pq.write_table(pq.read_table(part).replace_schema_metadata({b"fastgrad.job": b"another"}), part)
        plain(done, *more)

    monkeypatch.setattr(score_module, "join_parts", join)
    with pytest.raises(ValueError, match=r"part-00000001\.parquet was written by another run"):
        score(tiny_package, folder, out, part=4)
    assert not out.exists()
    monkeypatch.setattr(score_module, "join_parts", plain)
    assert score(tiny_package, folder, out, part=4)["continued"] == 19
    check(table(out), folder, tiny_package)


def test_a_folder_that_no_job_made_is_left_as_it_is(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = tmp_path / "o", tmp_path / "o.parts"
    parts.mkdir()
    (parts / "thesis.txt").write_text("the only copy")
    for _ in range(2):
        with pytest.raises(ValueError, match="was not made by fastgrad score"):
            score(tiny_package, folder, out)
        # A part by its name alone.
        (parts / "part-00000000.parquet").write_bytes(b"no part")
    assert (parts / "thesis.txt").read_text() == "the only copy"
    # Without a finished part it may be a job's, which was ended before, as by a full disk.
    (tmp_path / "e.parts").mkdir()
    (tmp_path / "e.parts" / ".fastgrad-0123456789abcdef").write_bytes(b"torn")
    assert score(tiny_package, folder, tmp_path / "e")["images"] == 23
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "l.parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="was not made by"):
        score(tiny_package, folder, tmp_path / "l")
    # What is put beside the parts of a job stays, too.
    plain = score_module.join_parts

    def beside(done: job.Job, *more: object) -> None:
        (done.folder / "notes.txt").write_text("mine")
        plain(done, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(score_module, "join_parts", beside)
    score(tiny_package, folder, tmp_path / "p")
    assert [path.name for path in (tmp_path / "p.parts").iterdir()] == ["notes.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="makes pipes")
@pytest.mark.parametrize(
    ("become", "error"),
    [
        (lambda path: os.mkfifo(path), "the file cannot be read: it is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "the file cannot be read: it is no regular file"),
        (lambda path: None, "the file cannot be read: No such file or directory"),
        (lambda path: path.write_bytes(many_scans(101)), "the image has more than 100 scans"),
    ],
    ids=["a pipe", "a device", "gone", "many scans"],
)
def test_a_file_that_became_something_else_gets_one_row(
    become: Any, error: str, folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether that happens before the files are listed, while they are, or after."""
    victim, plain = folder / "04.png", job.list_folder

    def late(*args: Any) -> Any:
        listed = plain(*args)
        victim.unlink()
        become(victim)
        return listed

    monkeypatch.setattr(job, "list_folder", late)
    score(tiny_package, folder, tmp_path / "o")
    rows = {row["name"]: row["error"] for row in table(tmp_path / "o")}
    assert len(rows) == 23
    assert rows["04.png"] == error


def test_a_file_that_vanishes_while_the_folder_is_listed_gets_a_row(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.walk

    def walk(*args: Any, **options: Any) -> Any:
        yield from [*plain(*args, **options)]
        (folder / "04.png").unlink()

    monkeypatch.setattr(os, "walk", walk)
    assert score(tiny_package, folder, tmp_path / "o")["unreadable"] == 4


def test_an_image_may_take_only_so_long(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_SCANS", 10**6)
    monkeypatch.setattr(job, "MAX_SECONDS", 0.1)
    (folder / "slow.jpg").write_bytes(many_scans(50_000))
    assert score(tiny_package, folder, tmp_path / "o")["images"] == 24
    rows = {row["name"]: row["error"] for row in table(tmp_path / "o")}
    assert rows["slow.jpg"] == "decoding the image takes more than 0.1 s"


def test_the_table_is_no_image_of_the_next_run(
    folder: Path, tiny_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for out in (folder / "table.png", Path("table.png"), Path("more") / ".." / "table.png"):
        assert score(tiny_package, folder, out)["images"] == 23


def test_odd_names_large_files_and_unreadable_ones(tiny_package: Path, tmp_path: Path) -> None:
    base = tmp_path / "images"
    base.mkdir()
    odd = os.fsencode(base) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(image(1))
    (base / "large.png").write_bytes(image(2, (60, 60)))
    (base / "old.tif").write_bytes(image(4, (8, 8), "TIFF"))
    rows = {}
    for limit in (2000, 10**6):
        out = tmp_path / f"{limit}.parquet"
        score(tiny_package, base, out, max_bytes=limit)
        rows[limit] = {row["name"]: row for row in table(out)}
    assert set(rows[2000]) == {r"caf\xe9.png", "large.png", "old.tif"}
    assert rows[2000][r"caf\xe9.png"]["error"] is None
    assert rows[2000]["large.png"]["error"] == "the image is too large; at most 2000 bytes are read"
    assert rows[10**6]["large.png"]["error"] is None
    assert "none of JPEG, PNG, WEBP" in rows[2000]["old.tif"]["error"]


def test_no_image_is_left_out_without_a_word(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "images"
    (base / "closed").mkdir(parents=True)
    (base / "0.png").write_bytes(image(0))
    (base / "1.png").symlink_to("nowhere")
    (base / "2.png").symlink_to("0.png")
    (base / "3.png").symlink_to("closed")
    if hasattr(os, "mkfifo"):
        os.mkfifo(base / "4.png")
    score(tiny_package, base, tmp_path / "out")
    rows = table(tmp_path / "out")
    missing = "the file cannot be read: No such file or directory"
    assert [(row["name"], row["error"]) for row in rows] == [("0.png", None), ("1.png", missing), ("2.png", None)]
    with monkeypatch.context() as patch:
        patch.setattr(ModelPackage, "rows", lambda _, x: np.full((len(x), 5), np.nan))
        score(tiny_package, base, tmp_path / "nan")
    assert "is not a finite number" in table(tmp_path / "nan")[0]["error"]
    plain = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="closed"):
        score(tiny_package, base, tmp_path / "again")


def test_images_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("a/1.png", "a-b/1.png", "a.png", "b/c/2.png", "b/c.png", "b/c-d/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, _ = sources.list_folder(tmp_path, tmp_path / "out")
    assert [tmp_path / name for name in found] == sorted(tmp_path.rglob("*.png"))


def test_names_have_slashes_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of Windows is that of Linux."""

    class Windows(type(tmp_path)):  # type: ignore[misc]
        def __fspath__(self) -> str:
            return str(self) if self.is_absolute() else str(self).replace("/", "\\")

    monkeypatch.setattr(sources, "Path", Windows)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "0.png").write_bytes(image(0))
    found, _ = sources.list_folder(tmp_path, tmp_path / "out")
    assert found == ["a/b/0.png"]


def test_large_cells_are_not_read(tiny_package: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    cells = [image(1), bytes(5000), None]
    for column in (pa.array(cells, pa.large_binary()), pa.array([{"bytes": cell} for cell in cells])):
        pq.write_table(pa.table({"image": column}), source)
        score(tiny_package, source, out, max_bytes=1000)
        errors = [row["error"] for row in table(out)]
        assert errors == [None, "the image is too large; at most 1000 bytes are read", "the image is empty"]
    # More than the system can count is no limit.
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(image(1))
    for place in (source, tmp_path / "images"):
        assert score(tiny_package, place, out, max_bytes=2**63)["images"] == len(pq.read_table(out))


def test_limits_of_the_file_and_of_the_caller_hold(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(read_description(tiny_package), max_batch=3)
    monkeypatch.setattr(package, "read_description", lambda path: small)
    assert score(tiny_package, folder, tmp_path / "o")["unreadable"] == 3
    assert score(tiny_package, folder, tmp_path / "o", max_pixels=71)["unreadable"] == 23


def test_images_are_decoded_while_the_network_runs(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, beside = threading.Event(), threading.Event()
    rows, decode = ModelPackage.rows, job.decode_pixels

    def slow(self: ModelPackage, x: Any) -> Any:
        running.set()
        # The first batch waits for an image of a later one; without one at work it would wait in vain.
        assert beside.wait(20)
        return rows(self, x)

    numbers = itertools.count()

    def watched(*args: Any, **options: Any) -> Any:
        # The first batch has two images; the third is not decoded before that batch runs.
        if next(numbers) >= 2:
            assert running.wait(20)
            beside.set()
        return decode(*args, **options)

    monkeypatch.setattr(ModelPackage, "rows", slow)
    monkeypatch.setattr(job, "decode_pixels", watched)
    score(tiny_package, folder, tmp_path / "o", batch=2, decoders=1)
    assert beside.is_set()


def test_what_the_caller_is_warned_of_comes_after_a_run_too(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

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

    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "images" / name).write_bytes(warned_of())
    monkeypatch.setattr(Image, "open", together)
    monkeypatch.setattr(job, "decode_pixels", watched)
    # Pillow warns of both, which is an error in these tests, and none of the images.
    assert score(tiny_package, tmp_path / "images", tmp_path / "o", decoders=2)["unreadable"] == 0
    assert warnings.filters == before


def test_command_line(folder: Path, tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.parquet"
    assert cli.main(["score", str(tiny_package), str(folder), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "23 images, 3 unreadable" in captured.out
    assert "23/23" in captured.err  # the progress bar
    for arguments, message in (
        ([str(tiny_package), str(tmp_path / "none"), "--out", str(out)], "folder or a Parquet file"),
        ([str(tiny_package), str(folder / "notes.txt"), "--out", str(out)], "not a readable Parquet"),
        ([str(tiny_package), str(folder), "--out", str(tmp_path / "no" / "o")], "existing folder"),
        ([str(folder / "notes.txt"), str(folder), "--out", str(out)], "not a readable .pt2"),
        ([str(tiny_package), str(folder), "--out", str(out), "--part", "0"], "part must be an integer of at least 1"),
        ([str(tiny_package), str(folder), "--out", str(out), "--workers", "2"], "--workers needs --ray"),
    ):
        assert cli.main(["score", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_is_stopped_says_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score_command, "score", stop)
    assert cli.main(["score", "model.pt2", "images", "--out", "o.parquet"]) == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err


def test_without_a_standard_error_there_is_no_bar(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["score", str(tiny_package), str(folder), "--out", str(tmp_path / "o.parquet")]) == 0


def test_an_output_that_pyarrow_cannot_open_is_refused_before_the_work(
    folder: Path, tiny_package: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"out must be a name in UTF-8, as pyarrow opens no other; it was '.*caf"):
        score(tiny_package, folder, tmp_path / os.fsdecode(b"caf\xe9.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


BYTES = pa.array([b""])
BOTH = pa.Table.from_arrays([BYTES] * 2, ["image", "image"])
NO_BYTES = "must hold bytes, or structs with bytes; it has "
#: What a Parquet file holds, options, and what is said.
UNFIT: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no column of images": ({"a": BYTES, "b": BYTES}, {}, r"--image-column.*a, b"),
    "no such column": ({"a": BYTES}, {"image_column": "c"}, "'c'"),
    "two columns": (BOTH, {}, "the file has image, image"),
    "lists": ({"image": pa.array([[1, 2]])}, {}, NO_BYTES + "list<"),
    "structs without bytes": ({"image": pa.array([{"path": "a.png"}])}, {}, NO_BYTES + "struct<path"),
    "texts": ({"image": pa.array(["a.png"])}, {}, NO_BYTES + "string"),
    "large texts": ({"image": pa.array(["a.png"], pa.large_string())}, {}, NO_BYTES + "large_string"),
    "a dictionary": ({"image": pa.array(["a.png"]).dictionary_encode()}, {}, NO_BYTES + "dictionary<values=string"),
    "no decoders": ({"image": BYTES}, {"decoders": 0}, "decoders must be an integer of at least 1; it was 0"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_parquet_file_or_option_that_does_not_fit(name: str, tiny_package: Path, tmp_path: Path) -> None:
    columns, options, message = UNFIT[name]
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=message):
        score(tiny_package, tmp_path / "in.parquet", tmp_path / "out", **options)


def test_what_cannot_be_scored(tiny_package: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for given, message in (
        ({}, "no images"),
        ({"image_column": "image"}, "image_column and key_column must be None for a folder; they were"),
        ({"key_column": "id"}, "image_column and key_column must be None for a folder; they were"),
    ):
        with pytest.raises(ValueError, match=message):
            score(tiny_package, tmp_path / "nothing", tmp_path / "out", **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"this model takes no images: its inputs have shape \(12,\)"):
        begin(tiny_package, tmp_path, tmp_path / "o.parts", input_shape=(12,), mean=None, std=None)
    with pytest.raises(TypeError, match="images must be a path; it was None"):
        score(tiny_package, None, tmp_path / "out.parquet")  # type: ignore[arg-type]
    (tmp_path / "other.pt2").write_bytes(b"no model")
    with pytest.raises(PackageError):
        score(tmp_path / "other.pt2", tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize("name", ["in.parquet", "model.pt2", "folder", "photo.png"])
def test_what_another_program_wrote_is_not_replaced(name: str, tiny_package: Path, tmp_path: Path) -> None:
    source, model, out = tmp_path / "in.parquet", tmp_path / "model.pt2", tmp_path / name
    pq.write_table(pa.table({"image": [image(0)]}), source)
    shutil.copy(tiny_package, model)
    (tmp_path / "folder").mkdir()
    (tmp_path / "photo.png").write_bytes(image(1))
    before = out.read_bytes() if out.is_file() else None
    with pytest.raises(ValueError, match=f"{name} was not made by fastgrad score and is left as it is"):
        score(model, source, out)
    assert before is None or out.read_bytes() == before
    # A result of its own is.
    for _ in range(2):
        assert score(model, source, tmp_path / "out")["images"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", ["pipe", "caf\udce9.txt", "part-caf\udce9.parquet"])
def test_a_file_that_pyarrow_cannot_open_is_another_programs(
    name: str, folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o.parts").mkdir()
    for path in (tmp_path / "o.parts" / name, tmp_path / name):
        if name == "pipe":
            os.mkfifo(path)
            # It would wait for who writes.
            monkeypatch.setattr(job.pq, "read_schema", None)
        else:
            path.touch()
    for out in (tmp_path / "o", tmp_path / name):
        with pytest.raises(ValueError, match="was not made by fastgrad score"):
            score(tiny_package, folder, out)


RAY = """
import json, os, signal, sys, threading, time, warnings
import ray
from fastgrad.deploy.score.ray import score_dataset
package, folder, out, kill = sys.argv[1:]
ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)

def killer():
    # Once the first parts are written, and again later.
    killed = 0
    while killed < 2:
        parts = len([name for name in os.listdir(out) if name.startswith("part")]) if os.path.isdir(out) else 0
        if parts >= 3 * (killed + 1):
            for entry in os.listdir("/proc"):
                try:
                    line = open(f"/proc/{entry}/cmdline", "rb").read()
                except (OSError, NotADirectoryError):
                    continue
                if line.startswith(b"ray::") and b"PartScorer" in line:
                    os.kill(int(entry), signal.SIGKILL)
                    killed += 1
                    print("killed", killed, flush=True)
                    break
        time.sleep(0.01)

if kill == "yes":
    threading.Thread(target=killer, daemon=True).start()
counts = score_dataset(package, folder, out, part=5, batch=5)
print(json.dumps(counts))
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["no", "yes"])
def test_ray_writes_every_image_once(tiny_package: Path, tmp_path: Path, kill: str) -> None:
    pytest.importorskip("ray")
    folder, out = tmp_path / "images", tmp_path / "scores"
    folder.mkdir()
    for i in range(400):
        (folder / f"{i:03d}.png").write_bytes(image(i, (300, 300)) if i % 50 else b"bad")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    printed = run_python("-W", "ignore", "-c", RAY, tiny_package, folder, out, kill, env=environment)
    if kill == "yes":
        assert "killed 2" in printed
    assert '"images": 400, "unreadable": 8' in printed
    # Readers of Parquet take the folder as one table; Ray's order of work does not show in it.
    rows = pq.read_table(sorted(out.glob("part-*.parquet"))).to_pylist()
    assert [row["name"] for row in rows] == [f"{i:03d}.png" for i in range(400)]
    model = ModelPackage(tiny_package)
    for row in rows[1::37]:
        direct = model(decode_image((folder / row["name"]).read_bytes(), model.description)[None])
        assert row["uncertainty"] == pytest.approx(float(direct.uncertainty), rel=1e-5, abs=1e-5)


RAY_SERVE = """
import sys, time, json, urllib.request, urllib.error
import ray
from ray import serve
from fastgrad.deploy.serve.ray import serve_model
package, image = sys.argv[1:]
ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
serve_model(package, port=8791)
def post(body, kind):
    try:
        request = urllib.request.Request("http://127.0.0.1:8791/predict", body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
content = open(image, "rb").read()
print("answers", json.dumps([post(content, "image/png"), post(b"x", "image/png"), post(content, "text/plain")]))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
def test_ray_serve_answers_as_the_server_does(tiny_package: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")
    content = image(3)
    (tmp_path / "a.png").write_bytes(content)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = run_python("-W", "ignore", "-c", RAY_SERVE, tiny_package, tmp_path / "a.png", env=environment)
    (line,) = (line for line in printed.splitlines() if line.startswith("answers"))
    good, unreadable, other = json.loads(line.removeprefix("answers"))
    model = ModelPackage(tiny_package)
    direct = model(decode_image(content, model.description)[None])
    assert good[0] == 200
    np.testing.assert_allclose(good[1]["probabilities"], direct.probabilities[0].numpy(), rtol=1e-5)
    assert (unreadable[0], other[0]) == (400, 415)
    assert "cannot be read" in unreadable[1]["detail"]
