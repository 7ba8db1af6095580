"""Runs that stop, go on, or meet another: no row is lost or doubled, and no file of others is touched."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored import OPTIONS, begin, errors, table

from fastgrad.deploy.score import job, local

Run = Callable[..., dict[str, int]]


def without_job(part: Path, others: dict[bytes, bytes] | None = None) -> None:
    """Take a job's id from one of its parts."""
    pq.write_table(pq.read_table(part).replace_schema_metadata(others or {}), part)


def test_interrupted_run_goes_on(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, parts, plain = tmp_path / "o", tmp_path / "o.parts", job.write_part
    written: list[str] = []

    def stopping(rows: Any, path: Path, *more: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        plain(rows, path, *more)

    run(out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_part", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(batch=2, part=4)
    assert not out.exists()
    # Other options would mix two jobs in one file, and so would other images of the same names.
    with pytest.raises(ValueError, match="another job"):
        run(batch=2, part=5)
    touched = folder / "00.png"
    before = touched.stat()
    os.utime(touched, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="another job"):
        run(batch=2, part=4)
    os.utime(touched, ns=(before.st_atime_ns, before.st_mtime_ns))
    # A part that another job wrote, one that is none, and what a process that was killed has left.
    without_job(parts / "part-00000000.parquet")
    (parts / "part-00000003.parquet").write_bytes(b"torn")
    (parts / ".fastgrad-0123456789abcdef").write_bytes(b"torn")
    with monkeypatch.context() as patch:
        patch.setattr(
            job, "write_part", lambda rows, path, *more: (written.append(path.name), plain(rows, path, *more))
        )
        assert run(batch=2, part=4)["continued"] == 4
    assert written == [f"part-{i:08d}.parquet" for i in (0, 1, 0, 2, 3, 4, 5)]
    assert errors(out) == errors(tmp_path / "whole")
    assert [row["class"] for row in table(out)] == [row["class"] for row in table(tmp_path / "whole")]
    assert not parts.exists()


def test_slower_run_adds_no_part(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, late = Path.unlink, []

    def unlink(path: Path, *more: Any, **options: Any) -> None:
        if path.name == "part-00000001.parquet":
            with pytest.raises(FileNotFoundError):
                job.write_part([], tmp_path / "o.parts" / "part-00000000.parquet", pa.schema([]), b"slower")
            late.append(path)
        plain(path, *more, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    run(part=4)
    assert len(late) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "o"]


def test_place_of_the_unfinished_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, the run that goes on removes it; next to the output, nothing ever would."""
    places, plain = [], pq.ParquetWriter
    monkeypatch.setattr(
        job.pq, "ParquetWriter", lambda path, *more: (places.append(path.parent.name), plain(path, *more))[1]
    )
    run()
    assert places[-1] == "o.parts"


@pytest.mark.parametrize("at", [0, 2, 4])
def test_two_runs_at_once(at: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, counts = job.Job.write, []

    def write(self: job.Job, model: Any, index: int, *more: Any) -> int:
        if index == at:
            monkeypatch.setattr(job.Job, "write", plain)
            counts.append(run(part=4))
        return plain(self, model, index, *more)

    monkeypatch.setattr(job.Job, "write", write)
    with pytest.raises(ValueError, match=r"o\.parts was removed meanwhile, as by another run with this out"):
        run(part=4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("o")] == ["o"]
    assert pq.read_table(tmp_path / "o").num_rows == counts[0]["images"]


def test_two_jobs_with_one_folder(
    run: Run, folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tmp_path / "o.parts"
    first = begin(tiny_package, folder, parts)
    monkeypatch.chdir(tmp_path)
    assert begin(tiny_package, Path("images"), parts).id == first.id
    # The first has no part yet; then it has no claim, as where parts were copied by their names.
    for change in (lambda: None, lambda: next(first.folder.iterdir()).unlink()):
        change()
        if not list(first.folder.iterdir()):
            job.write_part([], first.paths[0], first.schema, first.id)
        with pytest.raises(ValueError, match=r"o\.parts holds the parts of another job"):
            begin(tiny_package, folder, parts, 5)
    first.paths[0].unlink()
    assert run(part=4, **OPTIONS)["images"] == 23
    assert not list(tmp_path.glob("o.parts*"))


def test_part_that_comes_meanwhile(
    folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, plain, parts = itertools.count(), job._schema, tmp_path / "o.parts"
    first = begin(tiny_package, folder, parts, 9)
    job.write_part([], first.paths[0], first.schema, first.id)
    monkeypatch.setattr(job, "_schema", lambda path: plain(path) if next(looks) >= len(first.paths) else pa.schema([]))
    assert begin(tiny_package, folder, parts, 9).missing == [0, 1, 2]


def before_joining(change: Callable[[job.Job], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = local.join_parts
    monkeypatch.setattr(local, "join_parts", lambda done, out: (change(done), plain(done, out)))


def test_parts_of_another_job(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        before_joining(lambda done: without_job(done.paths[1], {b"fastgrad.job": b"another"}), patch)
        with pytest.raises(ValueError, match=r"00001\.parquet was written by another run"):
            run(part=4)
    assert not (tmp_path / "o").exists()
    assert run(part=4)["continued"] == 19


def test_files_of_others_stay(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("o.parts", "n.parts", "elsewhere", "e.parts"):
        (tmp_path / name).mkdir()
    (tmp_path / "o.parts" / "thesis.txt").write_text("the only copy")
    (tmp_path / "n.parts" / "part-00000000.parquet").write_bytes(b"a part by its name alone")
    (tmp_path / "l.parts").symlink_to(tmp_path / "elsewhere")
    for name in "onl":
        with pytest.raises(ValueError, match="was not made by fastgrad score and is left as it is"):
            run(out=tmp_path / name)
    assert (tmp_path / "o.parts" / "thesis.txt").read_text() == "the only copy"
    # Without a finished part it may be a job's, which ended before, for example because a disk was full.
    (tmp_path / "e.parts" / ".fastgrad-0123456789abcdef").write_bytes(b"torn")
    assert run(out=tmp_path / "e")["images"] == 23
    # What is put next to the parts of a job stays, too.
    before_joining(lambda done: (done.folder / "notes.txt").write_text("mine"), monkeypatch)
    run(out=tmp_path / "p")
    assert [path.name for path in (tmp_path / "p.parts").iterdir()] == ["notes.txt"]
