"""A job that scores many images: one row each, in parts that are complete or absent."""

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
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.file.reading import digest_of, open_regular
from fastgrad.deploy.score.sources import MAX_SECONDS, Source, list_folder, read_parquet

with extra("score"):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow.dataset import dataset, field
    from tqdm import tqdm

#: Key of a part's metadata that holds the `Job.id` of its writer.
_JOB = b"fastgrad.job"
_FOREIGN = "was not made by fastgrad score and is left as it is; choose another --out"


def write_part(rows: list[dict[str, Any]], path: Path, schema: Any, job: bytes) -> None:
    """Write one part of the job with this id; it appears whole or not at all."""
    with written_beside(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata({_JOB: job})), temporary)


def _schema(path: Path) -> Any:
    """Return the schema of a Parquet file; an empty one if there is no such file or pyarrow cannot open it."""
    # Opening a pipe would wait for its writer.
    with contextlib.suppress(OSError, UnicodeError, pa.ArrowInvalid):
        if path.is_file():
            return pq.read_schema(path)
    return pa.schema([])


def _job_of(schema: Any) -> Any:
    """Return the id of the job that wrote a part with this schema; None for a file of another program."""
    return (schema.metadata or {}).get(_JOB)


def check_out(path: Path, schema: Any) -> None:
    """Raise ValueError if ``path`` lies in no folder, or if a file of another program would be lost."""
    if not path.parent.is_dir():
        raise ValueError(f"out must lie in an existing folder; there is no {str(path.parent)!r}")
    if os.path.lexists(path) and _schema(path).names != schema.names:
        raise ValueError(f"{path} {_FOREIGN}")


def arrow_schema(description: Description) -> Any:
    """Return the columns: a name, the fields of `answer` with only the class's probability, and an error."""
    names = description.evidence
    evidence = pa.struct([(name, pa.float64()) for name in names]) if names else pa.null()
    return pa.schema(
        [
            ("name", pa.string()), ("class", pa.int64()), ("label", pa.string()), ("probability", pa.float64()),
            ("uncertainty", pa.float64()), ("risk", pa.float64()), ("reliable", pa.bool_()), ("accepted", pa.bool_()),
            ("evidence", evidence), ("alarm", pa.string()), ("error", pa.string()),
        ]
    )  # fmt: skip


@dataclass
class Job:
    """Images to score, divided into parts, and the folder of finished parts; the options are those of `score`.

    ``out`` is never an input, even if it lies among the images. The folder is created, or continued if it holds parts
    with this job's ``id``. ``missing`` lists the numbers of missing parts; ``done`` counts the images in the others.
    ValueError if the model takes no images, there are none, a file cannot be read, or the folder belongs to another job
    or program.
    """

    model: Path
    description: Description
    images: Path
    folder: Path
    out: Path
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
            digest_of(self.model), str(self.images), self._list_images(), self.part, self.threshold, self.columns,
            self.max_pixels, self.max_bytes,
        )  # fmt: skip
        self.id = hashlib.sha256(repr(identity).encode("ascii", "backslashreplace")).hexdigest().encode()
        # One byte more is read, and no read can ask for more than `sys.maxsize`.
        self.max_bytes = min(self.max_bytes, sys.maxsize - 1)
        self._open_folder()

    def _list_images(self) -> str:
        """Count the images; return a text that changes if they do."""
        images = self.images
        if images.is_dir():
            if any(self.columns):
                raise ValueError(f"image_column and key_column must be None for a folder; they were {self.columns}")
            self.listed, identity = list_folder(images, self.out.parent.resolve() / self.out.name)
            self.total = len(self.listed)
        elif images.is_file():
            try:
                self.total = pq.ParquetFile(images).metadata.num_rows
            except Exception as error:
                raise ValueError(f"{images} is not a readable Parquet file: {error}") from None
            list(read_parquet(images, *self.columns, stop=0))  # raises unless the columns are there
            stat = images.stat()
            identity = f"{stat.st_size} {stat.st_mtime_ns}"
        else:
            raise ValueError(f"images must be a folder or a Parquet file; there is no {str(images)!r}")
        if self.total == 0:
            raise ValueError(f"there are no images in {images}")
        return identity

    def _open_folder(self) -> None:
        """Create the folder, or find this job's parts in it; refuse other contents, which would later be removed."""
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
        # The folder belongs to the job that came first, even before it has written a part.
        claim = folder / (UNFINISHED + self.id.decode())
        others = [path for path in folder.glob(UNFINISHED + "?" * len(self.id)) if path != claim]
        # Parts may have been copied without the claim, and a run of the same job may have added one meanwhile.
        if others or any(_job_of(_schema(path)) not in (None, self.id) for path in folder.glob("part-*.parquet")):
            other = "the parts of another job (other model, images or options)"
            raise ValueError(f"{folder} holds {other}; remove it or choose another --out")
        if not all(path.name.startswith(UNFINISHED) or _job_of(_schema(path)) == self.id for path in folder.iterdir()):
            raise ValueError(f"{folder} {_FOREIGN}")
        with contextlib.suppress(FileExistsError):
            claim.touch(exist_ok=False)  # never through a link in its place

    def write(
        self, model: ModelPackage, index: int, pool: ThreadPoolExecutor, on_batch: Callable[[int], Any] = int
    ) -> int:
        """Score and write part ``index``; return its number of images. ``on_batch`` gets the size of each batch.

        The threads of ``pool`` decode the next batch meanwhile.
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
        # For all threads at once: if each turned Pillow's warnings off and on, one could restore another's setting.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while True:
                for source in itertools.islice(sources, 2 * size - len(waiting)):
                    waiting.append((source.name, pool.submit(self._decode, source)))
                if not waiting:
                    break
                batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
                rows += self._score(model, batch)
                on_batch(len(batch))
        write_part(rows, self.paths[index], self.schema, self.id)
        return len(rows)

    def _decode(self, source: Source) -> Array:
        content = source.content
        if isinstance(content, Path):
            try:
                with open_regular(content) as file:
                    # Python allocates as many bytes as it is asked to read.
                    content = file.read(min(self.max_bytes, os.fstat(file.fileno()).st_size) + 1)
            except OSError as error:
                # The error's own text would include the path.
                raise ImageError(f"the file cannot be read: {error.strerror or type(error).__name__}") from None
        if len(content) > self.max_bytes:
            raise ImageTooLargeError(f"the image is too large; at most {self.max_bytes} bytes are read")
        shape = self.description.input_shape
        return decode_pixels(content, shape, max_pixels=self.max_pixels, seconds=MAX_SECONDS)

    def _score(self, model: ModelPackage, items: list[tuple[str, Future[Array]]]) -> list[dict[str, Any]]:
        """Return one row per image; that of an unreadable image has only its name and an ``error``."""
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
        """Return a progress bar over the images, disabled without a standard error, as with ``2>&-``."""
        return tqdm(total=self.total, initial=self.done, unit="image", disable=not (show and sys.stderr))


def count_rows(parts: Sequence[Path]) -> dict[str, int]:
    """Count the images in the parts, and the unreadable and unreliable ones among them."""
    table = dataset(parts)
    counted = {"images": None, "unreadable": field("error").is_valid(), "unreliable": ~field("reliable")}
    return {name: table.count_rows(filter=condition) for name, condition in counted.items()}


def join_parts(job: Job, out: Path) -> None:
    """Join all parts in one Parquet file; then remove what the job wrote, and its folder if nothing else is in it."""
    # If the process is killed meanwhile, its temporary file is in the folder, which a later run removes.
    with written_beside(out, job.folder) as temporary, pq.ParquetWriter(temporary, job.schema) as writer:
        for part in job.paths:
            table = pq.read_table(part)
            if _job_of(table.schema) != job.id:
                raise ValueError(f"{part} was written by another run with this out; the same command writes it anew")
            writer.write_table(table.cast(job.schema))
    # Renamed first, so that a slower run with this ``out`` adds no part during the removal.
    gone = job.folder.rename(out.with_name(UNFINISHED + secrets.token_hex(8)))
    for path in (*(gone / part.name for part in job.paths), *gone.glob(UNFINISHED + "*")):
        path.unlink()
    try:
        gone.rmdir()
    except OSError:
        gone.rename(job.folder)
