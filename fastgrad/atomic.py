"""Files that appear under their name whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: How the names of files begin that are being written; a process that was killed leaves its own.
UNFINISHED = ".fastgrad-"


@contextlib.contextmanager
def written_beside(target: Path, folder: Path | None = None) -> Iterator[Path]:
    """Give a new file of a random name beside ``target``, or in ``folder``; it becomes the target if all goes well."""
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    temporary = (folder or target.parent) / (UNFINISHED + secrets.token_hex(8))
    # O_EXCL: never through a file or link that somebody has put there.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def replace_atomically(make: Callable[[Path], Any], path: str | os.PathLike[str]) -> None:
    """Call ``make(temporary_path)`` and move what it wrote to ``path``: never a half-written file."""
    target = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        # PyTorch opens a name by its UTF-8, which on Windows, and in some locales, is another one if not ASCII.
        temporary = Path(folder) / f"file{target.suffix}"
        make(temporary)
        # A copy into the target's own folder first: a rename across file systems is not atomic.
        with written_beside(target) as beside:
            shutil.copyfile(temporary, beside)
