"""A job of scoring many images: a row for each, in parts that are whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shutil
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgrad.atomic import UNFINISHED, written_beside
from fastgrad.checks import extra, fits_utf8
from fastgrad.deploy.file.answer import ResultError, answer
from fastgrad.deploy.file.description import Description, normalize_pixels
from fastgrad.deploy.file.images import Array, ImageError, ImageTooLargeError, decode_pixels, require_images
from fastgrad.deploy.file.package import ModelPackage, digest_of
from fastgrad.deploy.score.sources import Source, list_folder, read_parquet

with extra("score"):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow.dataset import dataset, field
    from tqdm import tqdm

#: In a part's metadata: the random id of the job that wrote it.
_JOB = b"fastgrad.job"
_FOREIGN = "was not made by fastgrad score and is left as it is; choose another --out"


def write_part(rows: list[dict[str, Any]], path: Path, schema: Any, job: str) -> None:
    """Write one part of the job of this id: whole under its name, or not at all."""
    with written_beside(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata({_JOB: job})), temporary)


def _schema(path: Path) -> Any:
    """Of a Parquet file; an empty one where there is no such file."""
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowInvalid):
        return pa.schema([])


def is_part(path: Path, job: str) -> bool:
    """Whether this is a part that the job wrote."""
    return bool((_schema(path).metadata or {}).get(_JOB) == job.encode())


def check_out(path: Path, schema: Any) -> None:
    """Raise ValueError where ``path`` is no name for a result: what another program wrote would be lost."""
    if not path.parent.is_dir():
        raise ValueError(f"out must lie in an existing folder; there is no {str(path.parent)!r}")
    if os.path.lexists(path) and _schema(path).names != schema.names:
        raise ValueError(f"{path} {_FOREIGN}")


def arrow_schema(description: Description) -> Any:
    """The columns: as the server answers (`answer`), but the probability of the class alone; and an image's error."""
    names = description.evidence
    evidence = pa.struct([(name, pa.float64()) for name in names]) if names else pa.null()
    return pa.schema(
        [
            ("name", pa.string()), ("class", pa.int64()), ("label", pa.string()), ("probability", pa.float64()),
            ("uncertainty", pa.float64()), ("risk", pa.float64()), ("reliable", pa.bool_()), ("evidence", evidence),
            ("alarm", pa.string()), ("error", pa.string()),
        ]
    )  # fmt: skip


class Job:
    """Images to score, cut into parts, and a folder of the parts that are there; the options are those of `score`.

    The folder is made, or continued where this very job has made it, as its ``note`` says. ``missing`` has the numbers
    of the parts that were not there, ``done`` is how many images the others hold. ValueError where the model takes no
    images, there are none, a file cannot be read, or the folder is another job's, or not made by one.
    """

    def __init__(
        self,
        model: Path,
        description: Description,
        images: Path,
        folder: Path,
        *,
        batch: int,
        part: int,
        false_alarm_rate: float | None,
        image_column: str | None,
        key_column: str | None,
        max_pixels: int,
        max_bytes: int,
    ) -> None:
        require_images(description.input_shape)
        self.threshold = description.threshold_at(false_alarm_rate)
        self.images, self.folder, self.batch, self.part = images.resolve(), folder, batch, part
        self.note = folder / "job.json"
        # One more byte is read, and of no more than the system counts.
        self.max_bytes = min(max_bytes, sys.maxsize - 1)
        self.columns, self.max_pixels = (image_column, key_column), max_pixels
        self.listed: list[Source] | None = None
        identity = self._look()
        self.id = self._open(
            {
                "model": digest_of(model), "images": str(self.images), "identity": identity, "total": self.total,
                "part": part, "threshold": self.threshold, "columns": list(self.columns),
                "limits": [max_pixels, max_bytes],
            }
        )  # fmt: skip
        self.paths = [folder / f"part-{i:08d}.parquet" for i in range(-(-self.total // part))]
        self.missing = [index for index, path in enumerate(self.paths) if not is_part(path, self.id)]
        self.done = self.total - sum(min(part, self.total - index * part) for index in self.missing)

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
        if not fits_utf8(str(self.folder)):
            raise ValueError(f"out must be a name in UTF-8, as pyarrow opens no other; it was {str(self.folder)!r}")
        # An empty folder is nobody's work.
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        if not os.path.lexists(self.folder):
            # It appears with its note inside; of several runs at once the first makes it.
            fresh = self.folder.with_name(UNFINISHED + secrets.token_hex(8))
            fresh.mkdir(parents=True)
            noted = {**job, "id": secrets.token_hex(16)}
            try:
                (fresh / self.note.name).write_text(json.dumps(noted, sort_keys=True, indent=1), "utf-8")
                fresh.rename(self.folder)
            except OSError:
                shutil.rmtree(fresh)
                if not os.path.lexists(self.folder):
                    raise
        try:
            note = json.loads(self.note.read_text("utf-8"))
            identity = str(note.pop("id"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.folder} {_FOREIGN}") from None
        if note != job:
            other = "the parts of another job (other model, images or options)"
            raise ValueError(f"{self.folder} holds {other}; remove it or choose another --out")
        return identity

    def write(self, model: ModelPackage, index: int, pool: ThreadPoolExecutor, told: Callable[[int], Any] = int) -> int:
        """Score part ``index`` and write it; return how many images it holds. Each batch's number is ``told``.

        While a batch is scored, the threads of ``pool`` decode the next.
        """
        start, size = index * self.part, min(self.batch, model.description.max_batch)
        stop = min(start + self.part, self.total)
        if self.listed is not None:
            sources = iter(self.listed[start:stop])
        else:
            sources = read_parquet(self.images, *self.columns, start, stop, self.max_bytes)
        waiting: deque[tuple[str, Future[Array]]] = deque()
        rows: list[dict[str, Any]] = []
        while True:
            for source in itertools.islice(sources, 2 * size - len(waiting)):
                decoded = pool.submit(_decode, source, model.description, self.max_pixels, self.max_bytes)
                waiting.append((source.name, decoded))
            if not waiting:
                break
            batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            rows += _score(model, batch, self.threshold)
            told(len(batch))
        write_part(rows, self.paths[index], arrow_schema(model.description), self.id)
        return len(rows)

    def progress_bar(self, show: bool) -> Any:
        """A progress bar over the images; none where there is no standard error, as with ``2>&-``."""
        return tqdm(total=self.total, initial=self.done, unit="image", disable=not (show and sys.stderr))


def _decode(source: Source, description: Description, max_pixels: int, max_bytes: int) -> Array:
    content = source.content
    if isinstance(content, Path):
        try:
            with content.open("rb") as file:
                # Python takes the memory for all that may be read.
                content = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
        except OSError as error:
            # Without the path, which an error's own text has.
            raise ImageError(f"the file cannot be read: {error.strerror or type(error).__name__}") from None
    if len(content) > max_bytes:
        raise ImageTooLargeError(f"the image is too large; at most {max_bytes} bytes are read")
    return decode_pixels(content, description.input_shape, max_pixels=max_pixels)


def _score(
    model: ModelPackage, items: list[tuple[str, Future[Array]]], threshold: float | None
) -> list[dict[str, Any]]:
    """Columns of `arrow_schema`, a row an image; where it cannot be read, its name and ``error``, which says why."""
    description = model.description
    rows: list[dict[str, Any]] = [{"name": name} for name, _ in items]
    readable, images = [], []
    for row, (_, decoded) in zip(rows, items, strict=True):
        try:
            images.append(decoded.result())
            readable.append(row)
        except ImageError as error:
            row["error"] = str(error)
    if images:
        pixels = torch.from_numpy(np.stack(images))
        for row, values in zip(readable, model.rows(normalize_pixels(description, pixels)), strict=True):
            try:
                fields = answer(description, threshold, values)
                row |= {"probability": fields.pop("probabilities")[fields["class"]], **fields}
            except ResultError as error:
                row["error"] = str(error)
    return rows


def count_rows(parts: Sequence[Path]) -> dict[str, int]:
    """How many images, unreadable and unreliable ones the parts hold."""
    table = dataset(parts)
    counted = {"images": None, "unreadable": field("error").is_valid(), "unreliable": ~field("reliable")}
    return {name: table.count_rows(filter=condition) for name, condition in counted.items()}


def join_parts(job: Job, out: Path, schema: Any) -> None:
    """Make one Parquet file of all parts, then remove what the job wrote, and the folder if nothing else is in it."""
    # What a process that is killed meanwhile leaves lies in the folder, which a later run removes.
    with written_beside(out, job.folder) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for part in job.paths:
            table = pq.read_table(part)
            if (table.schema.metadata or {}).get(_JOB) != job.id.encode():
                raise ValueError(f"{part} was written by another run with this out; the same command writes it anew")
            writer.write_table(table.cast(schema))
    # Under another name, so that a slower run with this out writes no part beside those that go.
    gone = job.folder.rename(out.with_name(UNFINISHED + secrets.token_hex(8)))
    for path in (*(gone / part.name for part in job.paths), *gone.glob(UNFINISHED + "*"), gone / job.note.name):
        path.unlink()
    try:
        gone.rmdir()
    except OSError:
        gone.rename(job.folder)
