"""Open files whose names may now lead to a pipe, a device, or more bytes than any disk holds."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from pathlib import Path
from typing import BinaryIO


def without_waiting(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file, as an ``opener`` of `open`, without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read; OSError for anything else, because a device may never end."""
    file = open(path, "rb", opener=without_waiting)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return file


def digest_of(path: str | os.PathLike[str], copy: Path | None = None, most: float = math.inf) -> str:
    """Return the SHA-256 of a regular file in hexadecimal digits; the bytes that were hashed are written to ``copy``.

    OSError for anything but a regular file, and for more than ``most`` bytes, before anything is copied.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file, open(copy or os.devnull, "wb") as target:
        size = os.fstat(file.fileno()).st_size
        # A file that grows beyond the limit is read no further.
        while size <= most and (block := file.read(1 << 20)):
            size = max(size, file.tell())
            digest.update(block)
            target.write(block)
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes or more; at most {most:.0f} are read", os.fspath(path))
    return digest.hexdigest()
