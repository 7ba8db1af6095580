"""The images to score: those of a folder, or of a column of a Parquet file, decoded in the processes of a loader."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.utils.data import Dataset

from fastgrad.checks import extra
from fastgrad.deploy.file.description import Description
from fastgrad.deploy.file.images import Array, ImageError, decode_pixels
from fastgrad.deploy.file.opening import open_regular

with extra("score"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

#: Most bytes of a file, or of a cell of a Parquet file; larger ones are not read.
MAX_BYTES = 64 * 2**20
#: Seconds of computing in which an image must be decoded.
MAX_SECONDS = 10.0
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def decode(content: bytes, description: Description, max_pixels: int, max_bytes: int = MAX_BYTES) -> Array | str:
    """Return the pixels of an image at the network's size, or why there are none."""
    if len(content) > max_bytes:
        return f"the image is too large; at most {max_bytes} bytes are read"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged images
        try:
            return decode_pixels(content, description.input_shape, max_pixels=max_pixels, seconds=MAX_SECONDS)
        except ImageError as error:
            return str(error)


class Images(Dataset[tuple[str, Array | str]]):
    """Names and pixels of the images of a folder or of a Parquet file, in order; the arguments are those of `score`.

    ``identity`` is a text that changes if the images do. ValueError if there are none, or no such columns.
    """

    def __init__(
        self, path: Path, description: Description, image: str | None, key: str | None, max_pixels: int, max_bytes: int
    ) -> None:
        # One byte more is read, and no read can ask for more than `sys.maxsize`.
        self.path, self._description, self._limits = path, description, (max_pixels, min(max_bytes, sys.maxsize - 1))
        self._names: list[str] | None = None
        if path.is_dir():
            if image or key:
                raise ValueError(f"image_column and key_column must be None for a folder; they were {(image, key)}")
            self._names, self.identity = list_folder(path)
            self._count = len(self._names)
        elif path.is_file():
            try:
                file = pq.ParquetFile(path)
            except Exception as error:
                raise ValueError(f"images must be a folder or a Parquet file; {path} is none: {error}") from None
            self._count, names = file.metadata.num_rows, file.schema_arrow.names
            self._image = _column(names, image, ("image", "img", "bytes", "content"), "image", required=True)
            self._key = _column(names, key, ("path", "name", "id"), "key", required=False)
            cells(pa.nulls(0, file.schema_arrow.field(self._image).type), 0)  # raises unless it can hold images
            status = path.stat()
            self.identity = f"{status.st_size} {status.st_mtime_ns}"
        else:
            raise ValueError(f"images must be a folder or a Parquet file; there is no {str(path)!r}")
        if not self._count:
            raise ValueError(f"images must hold at least one; there are none in {path}")
        self._rows: Iterator[tuple[int, str, bytes]] = iter(())
        self._next = 0

    def __len__(self) -> int:
        return self._count

    def __getitems__(self, numbers: list[int]) -> list[tuple[str, Array | str]]:
        """Return the images of a batch, whose numbers rise."""
        found: Iterable[tuple[str, bytes | str]] = self._stored(numbers)
        if self._names is not None:
            names = [self._names[number] for number in numbers]
            found = ((_text(os.fsencode(name)), self._file(self.path / name)) for name in names)
        return [
            (name, one if isinstance(one, str) else decode(one, self._description, *self._limits))
            for name, one in found
        ]

    def _file(self, path: Path) -> bytes | str:
        """Return the content of a file, or why there is none."""
        try:
            with open_regular(path) as file:
                # Python allocates as many bytes as it is asked to read.
                return file.read(min(self._limits[1], os.fstat(file.fileno()).st_size) + 1)
        except OSError as error:
            # The error's own text would include the path.
            return f"the file cannot be read: {error.strerror or type(error).__name__}"

    def _stored(self, numbers: list[int]) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of rows of the Parquet file; each process reads it once, from its first batch on."""
        if not self._next or numbers[0] < self._next:
            self._rows = self._read(numbers[0])
        wanted = set(numbers)
        for number, name, content in self._rows:
            self._next = number + 1
            if number in wanted:
                yield name, content
            if number == numbers[-1]:
                break

    def _read(self, first: int) -> Iterator[tuple[int, str, bytes]]:
        file = pq.ParquetFile(self.path)
        ends = list(itertools.accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
        groups = [group for group, end in enumerate(ends) if end > first]
        row = ends[groups[0] - 1] if groups[0] else 0
        columns = [self._image, *([self._key] if self._key else [])]
        try:
            # Few rows at a time: a group may hold all images.
            for stored in file.iter_batches(64, row_groups=groups, columns=columns, use_threads=False):
                contents = cells(stored.column(self._image), self._limits[1])
                keys = stored.column(self._key) if self._key else pa.nulls(len(contents))
                if keys.type in (pa.string(), pa.large_string()):  # may hold bytes that are not UTF-8
                    keys = keys.cast(pa.large_binary())
                for number, (key, content) in enumerate(zip(keys.to_pylist(), contents, strict=True), row):
                    name = _text(key) if isinstance(key, bytes) else str(number if key is None else key)
                    yield number, name, content
                row += len(contents)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is damaged in or after row {row}: {error}") from None


def list_folder(folder: Path) -> tuple[list[str], str]:
    """Return the sorted names of all image files below a folder, with slashes, and a digest of names, sizes and times.

    Links to files count, even broken ones, and so do files that vanish meanwhile. Links to folders are not followed.
    OSError if a folder cannot be read, because its images would be missing.
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
        try:
            status = (folder / name).stat()
        except OSError:
            size = time = -1
        else:
            if not stat.S_ISREG(status.st_mode):
                continue
            size, time = status.st_size, status.st_mtime_ns
        digest.update(b"%s\0%d %d\0" % (os.fsencode(name), size, time))
        listed.append(name)
    return listed, digest.hexdigest()


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def cells(column: Any, most: int) -> list[bytes]:
    """Return the first ``most`` + 1 bytes of cells of images: bytes or, as Hugging Face writes, structs with ``bytes``.

    ValueError if the column can hold neither.
    """
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


def _column(names: list[str], given: str | None, guesses: Sequence[str], what: str, *, required: bool) -> Any:
    found = next((name for name in (guesses if given is None else [given]) if names.count(name) == 1), None)
    if found is None and given is not None:
        raise ValueError(f"{what}_column must be one column of the file's ({', '.join(names)}); it was {given!r}")
    if found is None and required:
        raise ValueError(f"{what}_column must name the column with the images; the file has {', '.join(names)}")
    return found
