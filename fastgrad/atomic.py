"""Write files that appear under their names complete, or not at all."""

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

#: Prefix of the names of unfinished files; a process that is killed leaves its file behind.
UNFINISHED = ".fastgrad-"


@contextlib.contextmanager
def written_beside(target: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a new, randomly named file beside ``target`` or in ``folder``, and rename it to ``target`` on success."""
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    temporary = (folder or target.parent) / (UNFINISHED + secrets.token_hex(8))
    # O_EXCL: never write through an existing file or link.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def replace_atomically(make: Callable[[Path], Any], path: str | os.PathLike[str]) -> None:
    """Call ``make(temporary_path)`` and move the file it wrote to ``path``, which never holds half a file."""
    target = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        # PyTorch opens paths as UTF-8. On Windows and in some locales, a name that is not ASCII would be another file.
        temporary = Path(folder) / f"file{target.suffix}"
        make(temporary)
        # Copy into the target's own folder first: a rename across file systems is not atomic.
        with written_beside(target) as beside:
            shutil.copyfile(temporary, beside)
