"""The images to score: those of a folder, or of a column of a Parquet file."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fastgrad.checks import extra

with extra("score"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

#: Most bytes of a file, or of a cell of a Parquet file; larger ones are not read.
MAX_BYTES = 64 * 2**20
#: Seconds of computing in which an image must be decoded.
MAX_SECONDS = 10.0
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Source(NamedTuple):
    """One image to score: its path or key, and its bytes or file."""

    name: str
    content: bytes | Path


def list_folder(folder: Path, left_out: Path) -> tuple[list[str], str]:
    """Return the sorted names of all image files below a folder, with slashes, and a digest of names, sizes and times.

    Links to files count, even broken ones, and so do files that vanish meanwhile. Links to folders are not followed,
    and ``left_out`` does not count. OSError if a folder cannot be read, because its images would be missing.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    # Only names: the `Path` objects of a million images would take half a gigabyte.
    names: list[str] = []
    for where, _, files in os.walk(folder, onerror=refuse):
        below = Path(where).relative_to(folder)
        names += [(below / file).as_posix() for file in files if Path(file).suffix.lower() in SUFFIXES]
    listed, digest = [], hashlib.sha256()
    # In the order of paths, folder by folder.
    for name in sorted(names, key=lambda name: name.replace("/", "\0")):
        path = folder / name
        try:
            status = path.stat()
        except OSError:
            size = time = -1
        else:
            if path == left_out or not stat.S_ISREG(status.st_mode):
                continue
            size, time = status.st_size, status.st_mtime_ns
        digest.update(b"%s\0%d %d\0" % (os.fsencode(name), size, time))
        listed.append(name)
    return listed, digest.hexdigest()


def read_parquet(
    path: Path, column: str | None, key: str | None, start: int = 0, stop: int | None = None, most: int = MAX_BYTES
) -> Iterator[Source]:
    """Yield rows ``start`` to ``stop`` (None: the end) of a Parquet file; skip row groups without such rows.

    ``column`` holds the images, as bytes or structs with a field ``bytes``; cells are cut after ``most`` + 1 bytes.
    ``key`` holds the names; without one, a row's number is its name. If either is None, usual names are tried.
    ValueError if there is no such column, or several, it holds no bytes, or the file is damaged.
    """
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    column = _column(names, column, ("image", "img", "bytes", "content"), "image", required=True)
    key = _column(names, key, ("path", "name", "id"), "key", required=False)
    stop = file.metadata.num_rows if stop is None else stop
    ends = [0, *itertools.accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))]
    groups = [i for i, (first, end) in enumerate(itertools.pairwise(ends)) if first < stop and end > start]
    row = ends[groups[0]] if groups else 0
    columns = [column] + ([key] if key else [])
    _cells(pa.nulls(0, file.schema_arrow.field(column).type), most)  # before the first image is read
    try:
        for part in file.iter_batches(batch_size=64, row_groups=groups, columns=columns):
            images = _cells(part.column(column), most)
            keys = part.column(key) if key else pa.nulls(len(images))
            if keys.type in (pa.string(), pa.large_string()):  # may hold bytes that are not UTF-8
                keys = keys.cast(pa.large_binary())
            for number, (name, content) in enumerate(zip(keys.to_pylist(), images, strict=True), start=row):
                if isinstance(name, bytes):
                    name = name.decode("utf-8", "backslashreplace")
                if start <= number < stop:
                    yield Source(str(number if name is None else name), content)
            row += len(images)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged in or after row {row}: {error}") from None


def _cells(column: Any, most: int) -> list[bytes]:
    """Return the bytes of image cells, which are bytes or, as Hugging Face writes them, structs with ``bytes``."""
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        column = pc.struct_field(column, "bytes") if "bytes" in names else column
    try:
        if "string" in str(column.type):  # such as paths, also in a dictionary; the cast would accept them
            raise pa.ArrowInvalid
        column = column.cast(pa.large_binary())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise ValueError(f"the column of images must hold bytes, or structs with bytes; it has {column.type}") from None
    return [cell or b"" for cell in pc.binary_slice(column, 0, most + 1).to_pylist()]


def _column(names: list[str], given: str | None, guesses: Iterable[str], what: str, *, required: bool) -> Any:
    found = next((name for name in (guesses if given is None else [given]) if names.count(name) == 1), None)
    if found is None and given is not None:
        raise ValueError(f"--{what}-column must be one column of the file's ({', '.join(names)}); it was {given!r}")
    if found is None and required:
        raise ValueError(f"name the column with the images (--{what}-column); the file has {', '.join(names)}")
    return found
