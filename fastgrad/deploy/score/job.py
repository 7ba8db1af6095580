"""Scoring many images: where they come from, the row each one gets, and parts that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrad.checks import extra
from fastgrad.deploy.file.answer import ResultError, answer, results
from fastgrad.deploy.file.images import MAX_PIXELS, ImageError, decode_image
from fastgrad.deploy.file.package import Description, ModelPackage

with extra("score"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Source(NamedTuple):
    """One image to score.

    Attributes:
        name: its path, or its key in the Parquet file.
        content: its bytes, or None: to be read from ``path``.
        path: the file.
    """

    name: str
    content: bytes | None
    path: Path | None


def list_folder(folder: Path) -> list[Source]:
    """All image files below a folder, in the order of their names."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return [Source(str(path.relative_to(folder)), None, path) for path in sorted(found)]


def read_parquet(
    path: Path, column: str | None, key: str | None, start: int = 0, stop: int | None = None
) -> Iterator[Source]:
    """Rows ``start`` to ``stop`` of a Parquet file; row groups that hold none of them are not read.

    Args:
        path: the file.
        column: with the images, bytes or structs with a field ``bytes``; None takes the first of ``image``,
            ``img``, ``bytes``, ``content``.
        key: with the names; None takes ``path``, ``name``, ``id`` if there is one, else the row's number.
        start: first row.
        stop: row after the last; None: to the end.

    Raises:
        ValueError: there is no such column.
    """
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    column = _column(names, column, ("image", "img", "bytes", "content"), "image", required=True)
    key = _column(names, key, ("path", "name", "id"), "key", required=False)
    stop = file.metadata.num_rows if stop is None else stop
    groups: list[int] = []
    row = first = 0
    for group in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if row < stop and row + size > start:
            if not groups:
                first = row
            groups.append(group)
        row += size
    row = first
    columns = [column] + ([key] if key else [])
    for part in file.iter_batches(batch_size=64, row_groups=groups, columns=columns):
        images = part.column(column).to_pylist()
        keys = part.column(key).to_pylist() if key else range(row, row + len(images))
        for number, (name, content) in enumerate(zip(keys, images, strict=True), start=row):
            if start <= number < stop:
                yield Source(str(name), content_of(content), None)
        row += len(images)


def content_of(value: Any) -> bytes:
    """The bytes of an image cell: bytes, or a struct with a field ``bytes`` (as Hugging Face writes them)."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""


def _column(names: list[str], given: str | None, guesses: Iterable[str], what: str, *, required: bool) -> Any:
    if given is not None:
        if given not in names:
            raise ValueError(
                f"--{what}-column must be one of the file's columns ({', '.join(names)}); it was {given!r}"
            )
        return given
    found = next((guess for guess in guesses if guess in names), None)
    if found is None and required:
        raise ValueError(
            f"name the column with the images (--{what}-column); the file has {', '.join(names)}"
        )
    return found


def score_batch(
    model: ModelPackage,
    sources: list[Source],
    *,
    threshold: float | None,
    max_pixels: int = MAX_PIXELS,
    pool: ThreadPoolExecutor | None = None,
) -> list[dict[str, Any]]:
    """Score images; one row each, in their order.

    Returns:
        Rows with ``name``, ``class``, ``label``, ``probability`` (of that class), ``uncertainty``, ``reliable``,
        ``evidence`` and ``alarm``, as the server's answers have them (`answer`), and ``error``; where the image cannot
        be read, ``error`` says why and the others are None.
    """
    run = map if pool is None else pool.map
    decoded = list(run(lambda source: _decode(source, model.description, max_pixels), sources))
    columns = arrow_schema(model.description).names
    rows: list[dict[str, Any]] = [
        dict.fromkeys(columns) | {"name": source.name, "error": value if isinstance(value, str) else None}
        for source, value in zip(sources, decoded, strict=True)
    ]
    good = [(i, value) for i, value in enumerate(decoded) if isinstance(value, Tensor)]
    for start in range(0, len(good), model.description.max_batch):
        part = good[start : start + model.description.max_batch]
        found = results(model, torch.stack([x for _, x in part]))
        for (i, _), *values in zip(part, *found, strict=True):
            try:
                row = answer(model.description, threshold, *values)
            except ResultError as error:
                rows[i]["error"] = str(error)
                continue
            rows[i] |= {"probability": row.pop("probabilities")[row["class"]], **row}
    return rows


def _decode(source: Source, description: Description, max_pixels: int) -> Tensor | str:
    try:
        content = source.content
        if content is None:
            assert source.path is not None
            content = source.path.read_bytes()
        return decode_image(content, description, max_pixels=max_pixels)
    except (ImageError, OSError) as error:
        return str(error)


def arrow_schema(description: Description) -> Any:
    """The columns of the output; ``evidence`` has a field for each part, and is null where the file gives none."""
    names = description.evidence
    evidence = pa.struct([(name, pa.float64()) for name in names]) if names else pa.null()
    return pa.schema(
        [
            ("name", pa.string()), ("class", pa.int64()), ("label", pa.string()), ("probability", pa.float64()),
            ("uncertainty", pa.float64()), ("reliable", pa.bool_()), ("evidence", evidence), ("alarm", pa.string()),
            ("error", pa.string()),
        ]
    )  # fmt: skip


def write_part(rows: list[dict[str, Any]], path: Path, schema: Any) -> None:
    """Write one part: whole under its name, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def part_path(folder: Path, index: int) -> Path:
    """Where part ``index`` belongs."""
    return folder / f"part-{index:08d}.parquet"


class Job:
    """A source of images, cut into parts.

    Args:
        images: folder, or Parquet file.
        part: images in one part.
        image_column: of the Parquet file; None guesses.
        key_column: column that names the rows; None guesses.

    Raises:
        ValueError: nothing to score, or an unreadable file.
    """

    def __init__(
        self, images: Path, part: int, image_column: str | None = None, key_column: str | None = None
    ) -> None:
        if part < 1:
            raise ValueError(f"part must be at least 1; it was {part}")
        self.images, self.part = images.resolve(), part
        self.columns = (image_column, key_column)
        self.listed: list[Source] | None = None
        if images.is_dir():
            self.listed = list_folder(images)
            self.total = len(self.listed)
            names = "\n".join(item.name for item in self.listed)
            self.identity = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
        elif images.is_file():
            try:
                self.total = pq.ParquetFile(images).metadata.num_rows
            except Exception as error:
                raise ValueError(f"{images} is not a readable Parquet file: {error}") from None
            list(read_parquet(images, *self.columns, stop=0))  # the columns are there
            self.identity = f"{images.stat().st_size} {images.stat().st_mtime_ns}"
        else:
            raise ValueError(f"images must be a folder or a Parquet file; there is no {str(images)!r}")
        if self.total == 0:
            raise ValueError(f"there are no images in {images}")

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.total // self.part)

    def size(self, index: int) -> int:
        """How many images part ``index`` has."""
        return min(self.part, self.total - index * self.part)

    def sources(self, index: int) -> Iterator[Source]:
        """The images of part ``index``, read as they are asked for."""
        start = index * self.part
        if self.listed is not None:
            return iter(self.listed[start : start + self.part])
        return read_parquet(self.images, *self.columns, start, start + self.size(index))

    def open(self, folder: Path, model: Path, threshold: float | None, max_pixels: int) -> None:
        """Start or continue this job, whose parts lie in ``folder``.

        Raises:
            ValueError: the folder holds parts of another job.
        """
        job = {
            "model": digest_of(model),
            "images": str(self.images),
            "identity": self.identity,
            "total": self.total,
            "part": self.part,
            "threshold": threshold,
            "columns": self.columns,
            "max_pixels": max_pixels,
        }
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "job.json"
        text = json.dumps(job, sort_keys=True, indent=1)
        if note.exists():
            if note.read_text() != text:
                raise ValueError(
                    f"{folder} holds the parts of another job (other model, images or options); remove it or "
                    "choose another --out"
                )
            return
        temporary = note.with_name(f".job.{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, note)


def count_rows(parts: Iterable[Path]) -> dict[str, int]:
    """How many images, unreadable and unreliable ones the parts hold."""
    counts = {"images": 0, "unreadable": 0, "unreliable": 0}
    for path in parts:
        table = pq.read_table(path, columns=["reliable", "error"])
        counts["images"] += table.num_rows
        counts["unreadable"] += table.num_rows - table.column("error").null_count
        counts["unreliable"] += pc.sum(pc.equal(table.column("reliable"), False)).as_py() or 0
    return counts


def join_parts(folder: Path, count: int, out: Path, schema: Any) -> None:
    """Make one Parquet file of all parts, then remove them."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for index in range(count):
                writer.write_table(pq.read_table(part_path(folder, index), schema=schema))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    shutil.rmtree(folder)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def progress_bar(total: int, done: int, show: bool) -> Any:
    """A progress bar over images."""
    with extra("score"):
        from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="image", disable=not show)
