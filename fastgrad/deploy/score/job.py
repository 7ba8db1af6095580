"""A job of scoring many images: a row for each, in parts that are whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import secrets
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
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

#: In a part's metadata: the job that wrote it, as `Job.id`.
_JOB = b"fastgrad.job"
_FOREIGN = "was not made by fastgrad score and is left as it is; choose another --out"


def write_part(rows: list[dict[str, Any]], path: Path, schema: Any, job: bytes) -> None:
    """Write one part of the job of this id: whole under its name, or not at all."""
    with written_beside(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata({_JOB: job})), temporary)


def _schema(path: Path) -> Any:
    """Of a Parquet file; an empty one where there is none, nor a name that pyarrow opens."""
    # Opening a pipe would wait for who writes to it.
    with contextlib.suppress(OSError, UnicodeError, pa.ArrowInvalid):
        if path.is_file():
            return pq.read_schema(path)
    return pa.schema([])


def _job_of(schema: Any) -> Any:
    """The id of the job that wrote a part of this schema; None for another program's file."""
    return (schema.metadata or {}).get(_JOB)


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


@dataclass
class Job:
    """Images to score, cut into parts, and a folder of the parts that are there; the options are those of `score`.

    The folder is made, or continued where it holds parts of this very job, which bear its ``id``. ``missing`` has the
    numbers of the parts that were not there, ``done`` is how many images the others hold. ValueError where the model
    takes no images, there are none, a file cannot be read, or the folder is another job's, or not made by one.
    """

    model: Path
    description: Description
    images: Path
    folder: Path
    _: KW_ONLY
    batch: int
    part: int
    false_alarm_rate: float | None
    columns: tuple[str | None, str | None]  # of a Parquet file's images and names
    max_pixels: int
    max_bytes: int

    def __post_init__(self) -> None:
        require_images(self.description.input_shape)
        self.threshold = self.description.threshold_at(self.false_alarm_rate)
        self.schema = arrow_schema(self.description)
        self.images = self.images.resolve()
        self.listed: list[str] | None = None
        identity = (
            digest_of(self.model), str(self.images), self._look(), self.part, self.threshold, self.columns,
            self.max_pixels, self.max_bytes,
        )  # fmt: skip
        self.id = hashlib.sha256(repr(identity).encode("ascii", "backslashreplace")).hexdigest().encode()
        # One more byte is read, and of no more than the system counts.
        self.max_bytes = min(self.max_bytes, sys.maxsize - 1)
        self._open()

    def _look(self) -> str:
        """Count the images; return what changes when they do."""
        images = self.images
        if images.is_dir():
            if any(self.columns):
                raise ValueError(f"image_column and key_column must be None for a folder; they were {self.columns}")
            self.listed, identity = list_folder(images)
            self.total = len(self.listed)
        elif images.is_file():
            try:
                self.total = pq.ParquetFile(images).metadata.num_rows
            except Exception as error:
                raise ValueError(f"{images} is not a readable Parquet file: {error}") from None
            list(read_parquet(images, *self.columns, stop=0))  # the columns are there
            stat = images.stat()
            identity = f"{stat.st_size} {stat.st_mtime_ns}"
        else:
            raise ValueError(f"images must be a folder or a Parquet file; there is no {str(images)!r}")
        if self.total == 0:
            raise ValueError(f"there are no images in {images}")
        return identity

    def _open(self) -> None:
        """Make the folder, or find the parts of this job; nothing else is adopted, and so removed at the end."""
        folder = self.folder
        if not fits_utf8(str(folder)):
            raise ValueError(f"out must be a name in UTF-8, as pyarrow opens no other; it was {str(folder)!r}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
        if folder.is_symlink() or not folder.is_dir():
            raise ValueError(f"{folder} {_FOREIGN}")
        self.paths = [folder / f"part-{i:08d}.parquet" for i in range(-(-self.total // self.part))]
        self.missing = [index for index, path in enumerate(self.paths) if _job_of(_schema(path)) != self.id]
        self.done = self.total - sum(min(self.part, self.total - index * self.part) for index in self.missing)
        if self.done:
            return
        # The folder is that job's which came first, also before its first part is there.
        claim = folder / (UNFINISHED + self.id.decode())
        others = [path for path in folder.glob(UNFINISHED + "?" * len(self.id)) if path != claim]
        # Parts may have been copied without the claim; one of this job may have come since, by the same command.
        if others or any(_job_of(_schema(path)) not in (None, self.id) for path in folder.glob("part-*.parquet")):
            other = "the parts of another job (other model, images or options)"
            raise ValueError(f"{folder} holds {other}; remove it or choose another --out")
        if not all(path.name.startswith(UNFINISHED) or _job_of(_schema(path)) == self.id for path in folder.iterdir()):
            raise ValueError(f"{folder} {_FOREIGN}")
        with contextlib.suppress(FileExistsError):
            claim.touch(exist_ok=False)  # never through a link that somebody has put there

    def write(self, model: ModelPackage, index: int, pool: ThreadPoolExecutor, told: Callable[[int], Any] = int) -> int:
        """Score part ``index`` and write it; return how many images it holds. Each batch's number is ``told``.

        While a batch is scored, the threads of ``pool`` decode the next.
        """
        start, stop = index * self.part, (index + 1) * self.part
        size = min(self.batch, model.description.max_batch)
        if self.listed is None:
            sources = read_parquet(self.images, *self.columns, start, stop, self.max_bytes)
        else:
            names = ((os.fsencode(name), self.images / name) for name in self.listed[start:stop])
            sources = (Source(name.decode("utf-8", "backslashreplace"), path) for name, path in names)
        waiting: deque[tuple[str, Future[Array]]] = deque()
        rows: list[dict[str, Any]] = []
        # Of all threads: were each to turn Pillow's warnings off and on, the last would restore what another set.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while True:
                for source in itertools.islice(sources, 2 * size - len(waiting)):
                    waiting.append((source.name, pool.submit(self._decode, source)))
                if not waiting:
                    break
                batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
                rows += self._score(model, batch)
                told(len(batch))
        write_part(rows, self.paths[index], self.schema, self.id)
        return len(rows)

    def _decode(self, source: Source) -> Array:
        content = source.content
        if isinstance(content, Path):
            try:
                with content.open("rb") as file:
                    # Python takes the memory for all that may be read.
                    content = file.read(min(self.max_bytes, os.fstat(file.fileno()).st_size) + 1)
            except OSError as error:
                # Without the path, which an error's own text has.
                raise ImageError(f"the file cannot be read: {error.strerror or type(error).__name__}") from None
        if len(content) > self.max_bytes:
            raise ImageTooLargeError(f"the image is too large; at most {self.max_bytes} bytes are read")
        return decode_pixels(content, self.description.input_shape, max_pixels=self.max_pixels)

    def _score(self, model: ModelPackage, items: list[tuple[str, Future[Array]]]) -> list[dict[str, Any]]:
        """A row an image; where it cannot be read, its name and ``error``, which says why."""
        rows: list[dict[str, Any]] = [{"name": name} for name, _ in items]
        readable, images = [], []
        for row, (_, decoded) in zip(rows, items, strict=True):
            try:
                images.append(decoded.result())
                readable.append(row)
            except ImageError as error:
                row["error"] = str(error)
        if images:
            x = normalize_pixels(self.description, torch.from_numpy(np.stack(images)))
            for row, values in zip(readable, model.rows(x), strict=True):
                try:
                    fields = answer(self.description, self.threshold, values)
                    row |= {"probability": fields.pop("probabilities")[fields["class"]], **fields}
                except ResultError as error:
                    row["error"] = str(error)
        return rows

    def progress_bar(self, show: bool) -> Any:
        """A progress bar over the images; none where there is no standard error, as with ``2>&-``."""
        return tqdm(total=self.total, initial=self.done, unit="image", disable=not (show and sys.stderr))


def count_rows(parts: Sequence[Path]) -> dict[str, int]:
    """How many images, unreadable and unreliable ones the parts hold."""
    table = dataset(parts)
    counted = {"images": None, "unreadable": field("error").is_valid(), "unreliable": ~field("reliable")}
    return {name: table.count_rows(filter=condition) for name, condition in counted.items()}


def join_parts(job: Job, out: Path) -> None:
    """Make one Parquet file of all parts, then remove what the job wrote, and the folder if nothing else is in it."""
    # What a process that is killed meanwhile leaves lies in the folder, which a later run removes.
    with written_beside(out, job.folder) as temporary, pq.ParquetWriter(temporary, job.schema) as writer:
        for part in job.paths:
            table = pq.read_table(part)
            if _job_of(table.schema) != job.id:
                raise ValueError(f"{part} was written by another run with this out; the same command writes it anew")
            writer.write_table(table.cast(job.schema))
    # Under another name, so that a slower run with this out writes no part beside those that go.
    gone = job.folder.rename(out.with_name(UNFINISHED + secrets.token_hex(8)))
    for path in (*(gone / part.name for part in job.paths), *gone.glob(UNFINISHED + "*")):
        path.unlink()
    try:
        gone.rmdir()
    except OSError:
        gone.rename(job.folder)
