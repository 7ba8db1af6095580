"""Scoring many images: where they come from, the row each one gets, and parts that are whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastgrad.checks import extra
from fastgrad.deploy.file.answer import ResultError, answer
from fastgrad.deploy.file.atomic import written_beside
from fastgrad.deploy.file.description import DTYPES, Description
from fastgrad.deploy.file.images import MAX_PIXELS, ImageError, decode_pixels
from fastgrad.deploy.file.package import ModelPackage, digest_of

with extra("score"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: In a part's metadata: the random id of the job that wrote it.
_JOB = b"fastgrad.job"
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Limits(NamedTuple):
    """Of one image.

    Attributes:
        pixels: larger ones are not decoded.
        size: bytes of a file, or of a cell of a Parquet file; larger ones are not read.
    """

    pixels: int = MAX_PIXELS
    size: int = 64 * 2**20


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


def at_least_one(**values: int) -> None:
    """Raise ValueError for an argument below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; it was {value}")


def list_folder(folder: Path) -> tuple[list[Source], str]:
    """All image files below a folder in the order of their names, and a digest of names, sizes and times."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    sources, digest = [], hashlib.sha256()
    for path in sorted(found):
        name, stat = os.fsencode(path.relative_to(folder)), path.stat()
        digest.update(b"%s\0%d %d\0" % (name, stat.st_size, stat.st_mtime_ns))
        sources.append(Source(name.decode("utf-8", "backslashreplace"), None, path))
    return sources, digest.hexdigest()


def read_parquet(
    path: Path,
    column: str | None,
    key: str | None,
    start: int = 0,
    stop: int | None = None,
    most: int = Limits().size,
) -> Iterator[Source]:
    """Rows ``start`` to ``stop`` of a Parquet file; row groups that hold none of them are not read.

    Args:
        path: the file.
        column: with the images, bytes or structs with a field ``bytes``; None takes the first of ``image``,
            ``img``, ``bytes``, ``content``.
        key: with the names; None takes ``path``, ``name``, ``id`` if there is one, else the row's number.
        start: first row.
        stop: row after the last; None: to the end.
        most: bytes of a cell; of a larger one no more than one byte beyond comes.

    Raises:
        ValueError: there is no such column.
    """
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    column = _column(names, column, ("image", "img", "bytes", "content"), "image", required=True)
    key = _column(names, key, ("path", "name", "id"), "key", required=False)
    stop = file.metadata.num_rows if stop is None else stop
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    ends = list(itertools.accumulate(sizes))
    groups = [
        i for i, (size, end) in enumerate(zip(sizes, ends, strict=True)) if end - size < stop and end > start
    ]
    row = ends[groups[0]] - sizes[groups[0]] if groups else 0
    columns = [column] + ([key] if key else [])
    for part in file.iter_batches(batch_size=64, row_groups=groups, columns=columns):
        images = _cells(part.column(column), most)
        keys = part.column(key).to_pylist() if key else range(row, row + len(images))
        for number, (name, content) in enumerate(zip(keys, images, strict=True), start=row):
            if start <= number < stop:
                yield Source(str(name), content, None)
        row += len(images)


def _cells(column: Any, most: int) -> list[bytes]:
    """The bytes of image cells: bytes, or structs with a field ``bytes`` (as Hugging Face writes them)."""
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        column = pc.struct_field(column, "bytes") if "bytes" in names else pa.nulls(len(column), pa.binary())
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return [b""] * len(column)
    return [cell or b"" for cell in pc.binary_slice(column, 0, most + 1).to_pylist()]


def _column(names: list[str], given: str | None, guesses: Iterable[str], what: str, *, required: bool) -> Any:
    if given is not None:
        if given not in names:
            listed = ", ".join(names)
            raise ValueError(
                f"--{what}-column must be one of the file's columns ({listed}); it was {given!r}"
            )
        return given
    found = next((guess for guess in guesses if guess in names), None)
    if found is None and required:
        listed = ", ".join(names)
        raise ValueError(f"name the column with the images (--{what}-column); the file has {listed}")
    return found


def score_sources(
    model: ModelPackage,
    sources: Iterator[Source],
    *,
    batch: int,
    threshold: float | None,
    limits: Limits,
    pool: ThreadPoolExecutor,
) -> Iterator[list[dict[str, Any]]]:
    """Score images; the rows of one batch after another, in their order. The next ones are decoded meanwhile.

    Returns:
        Rows with ``name``, ``class``, ``label``, ``probability`` (of that class), ``uncertainty``, ``risk``,
        ``reliable``, ``evidence`` and ``alarm``, as the server's answers have them (`answer`), and ``error``; where the
        image cannot be read, ``error`` says why and the others are None.
    """
    waiting: deque[tuple[str, Future[Pixels | str]]] = deque()
    size = min(batch, model.description.max_batch)
    while True:
        for source in itertools.islice(sources, 2 * size - len(waiting)):
            waiting.append((source.name, pool.submit(_decode, source, model.description, limits)))
        if not waiting:
            return
        yield _score(model, [waiting.popleft() for _ in range(min(size, len(waiting)))], threshold)


def _score(
    model: ModelPackage, items: list[tuple[str, Future[Pixels | str]]], threshold: float | None
) -> list[dict[str, Any]]:
    description = model.description
    columns = arrow_schema(description).names
    decoded = [future.result() for _, future in items]
    rows: list[dict[str, Any]] = [
        dict.fromkeys(columns) | {"name": name, "error": value if isinstance(value, str) else None}
        for (name, _), value in zip(items, decoded, strict=True)
    ]
    good = [(row, value) for row, value in zip(rows, decoded, strict=True) if not isinstance(value, str)]
    if good:
        pixels = torch.from_numpy(np.stack([value for _, value in good]))
        x = description.normalize(pixels.to(DTYPES[description.input_dtype]) / 255)
        for (row, _), values in zip(good, model.rows(x), strict=True):
            try:
                found = answer(description, threshold, values)
            except ResultError as error:
                row["error"] = str(error)
                continue
            row |= {"probability": found.pop("probabilities")[found["class"]], **found}
    return rows


def _decode(source: Source, description: Description, limits: Limits) -> Pixels | str:
    try:
        content = source.content
        if content is None:
            assert source.path is not None
            with source.path.open("rb") as file:
                content = file.read(limits.size + 1)
        if len(content) > limits.size:
            return f"the image is too large; at most {limits.size} bytes are read"
        return decode_pixels(content, description.input_shape, max_pixels=limits.pixels)
    except ImageError as error:
        return str(error)
    except OSError as error:
        # Without the path, which an error's own text has.
        return f"the file cannot be read: {error.strerror or type(error).__name__}"


def arrow_schema(description: Description) -> Any:
    """The columns of the output; ``evidence`` has a field for each part, and is null where the file gives none."""
    names = description.evidence
    evidence = pa.struct([(name, pa.float64()) for name in names]) if names else pa.null()
    return pa.schema(
        [
            ("name", pa.string()), ("class", pa.int64()), ("label", pa.string()), ("probability", pa.float64()),
            ("uncertainty", pa.float64()), ("risk", pa.float64()), ("reliable", pa.bool_()), ("evidence", evidence),
            ("alarm", pa.string()), ("error", pa.string()),
        ]
    )  # fmt: skip


def write_part(rows: list[dict[str, Any]], path: Path, schema: Any, job: str) -> None:
    """Write one part of a job: whole under its name, or not at all."""
    with written_beside(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata({_JOB: job})), temporary)


def is_part(path: Path, job: str) -> bool:
    """Whether this is a part that the job wrote."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return bool(metadata.get(_JOB) == job.encode())


class Job:
    """Images to score, cut into parts, and a folder of the parts that are there.

    Args:
        model: the exported file.
        description: of it.
        images: folder, or Parquet file.
        folder: of the parts. It is made, or continued where this very job has made it.
        batch: images in one run of the model.
        part: images in one part.
        false_alarm_rate: share of in-distribution images to call unreliable; None: the model file's own.
        image_column: of the Parquet file; None guesses.
        key_column: column that names the rows; None guesses.
        limits: of an image.

    Attributes:
        missing: numbers of the parts that are not there yet.

    Raises:
        ValueError: nothing to score, an unreadable file, or a folder of another job, or not made by one.
    """

    def __init__(
        self,
        model: Path,
        description: Description,
        images: Path,
        folder: Path,
        *,
        batch: int = 64,
        part: int = 4096,
        false_alarm_rate: float | None = None,
        image_column: str | None = None,
        key_column: str | None = None,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
    ) -> None:
        at_least_one(batch=batch, part=part)
        self.threshold = description.threshold_at(false_alarm_rate)
        self.images, self.folder, self.batch, self.part = images.resolve(), folder, batch, part
        self.columns, self.limits = (image_column, key_column), limits
        self.listed: list[Source] | None = None
        identity = self._look()
        self.id = self._open(
            {
                "model": digest_of(model), "images": str(self.images), "identity": identity, "total": self.total,
                "part": part, "threshold": self.threshold, "columns": list(self.columns), "limits": list(limits),
            }
        )  # fmt: skip
        self.missing = [index for index, path in enumerate(self.paths) if not is_part(path, self.id)]

    def _look(self) -> str:
        """Count the images; return what changes when they do."""
        images = self.images
        if images.is_dir():
            self.listed, identity = list_folder(images)
            self.total = len(self.listed)
        elif images.is_file():
            try:
                self.total = pq.ParquetFile(images).metadata.num_rows
            except Exception as error:
                raise ValueError(f"{images} is not a readable Parquet file: {error}") from None
            list(read_parquet(images, *self.columns, stop=0))  # the columns are there
            stat = images.stat()
            with images.open("rb") as file:
                # The table of contents, and all of a small file.
                file.seek(-min(stat.st_size, 2**20), os.SEEK_END)
                identity = f"{stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(file.read()).hexdigest()}"
        else:
            raise ValueError(f"images must be a folder or a Parquet file; there is no {str(images)!r}")
        if self.total == 0:
            raise ValueError(f"there are no images in {images}")
        return identity

    def _open(self, job: dict[str, Any]) -> str:
        """Make the folder, or check that this job has made it; return the job's random id."""
        note = self.folder / "job.json"
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            identity = secrets.token_hex(16)
            with written_beside(note) as temporary:
                temporary.write_text(json.dumps({**job, "id": identity}, sort_keys=True, indent=1), "utf-8")
            return identity
        try:
            found = json.loads(note.read_text("utf-8"))
            identity = str(found.pop("id"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{self.folder} was not made by fastgrad score and is left as it is; choose another --out"
            ) from None
        if found != job:
            raise ValueError(
                f"{self.folder} holds the parts of another job (other model, images or options); remove it or "
                "choose another --out"
            )
        return identity

    @property
    def paths(self) -> list[Path]:
        """Where each part belongs."""
        return [self.folder / f"part-{i:08d}.parquet" for i in range(-(-self.total // self.part))]

    @property
    def done(self) -> int:
        """How many images the parts hold that were there from the beginning."""
        return self.total - sum(min(self.part, self.total - index * self.part) for index in self.missing)

    def write(
        self, model: ModelPackage, index: int, pool: ThreadPoolExecutor, told: Callable[[int], Any] = int
    ) -> int:
        """Score part ``index`` and write it; return how many images it holds. Each batch's number is ``told``."""
        start, rows = index * self.part, list[dict[str, Any]]()
        stop = min(start + self.part, self.total)
        if self.listed is not None:
            sources = iter(self.listed[start:stop])
        else:
            sources = read_parquet(self.images, *self.columns, start, stop, self.limits.size)
        for found in score_sources(
            model, sources, batch=self.batch, threshold=self.threshold, limits=self.limits, pool=pool
        ):
            rows += found
            told(len(found))
        write_part(rows, self.paths[index], arrow_schema(model.description), self.id)
        return len(rows)


def count_rows(parts: Iterable[Path]) -> dict[str, int]:
    """How many images, unreadable and unreliable ones the parts hold."""
    counts = {"images": 0, "unreadable": 0, "unreliable": 0}
    for path in parts:
        table = pq.read_table(path, columns=["reliable", "error"])
        counts["images"] += table.num_rows
        counts["unreadable"] += table.num_rows - table.column("error").null_count
        counts["unreliable"] += pc.sum(pc.equal(table.column("reliable"), False)).as_py() or 0
    return counts


def join_parts(job: Job, out: Path, schema: Any) -> None:
    """Make one Parquet file of all parts, then remove them, and the folder if nothing else is in it."""
    with written_beside(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for part in job.paths:
            writer.write_table(pq.read_table(part).cast(schema))
    for path in (*job.paths, job.folder / "job.json"):
        path.unlink()
    with contextlib.suppress(OSError):
        job.folder.rmdir()


def progress_bar(total: int, done: int, show: bool) -> Any:
    """A progress bar over images."""
    with extra("score"):
        from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="image", disable=not show)
