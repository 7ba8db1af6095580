"""Names that may lead to something else by now, and names that other users of the machine can foresee."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from python_process import run_python

from fastgrad import _torch
from fastgrad.deploy.file.package import PackageError, read_description
from fastgrad.deploy.file.reading import digest_of, open_regular

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes pipes and links")

NOT_REGULAR: dict[str, tuple[Callable[[Path], Any], type[OSError], str]] = {
    "a pipe": (lambda path: os.mkfifo(path), OSError, "no regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), OSError, "no regular file"),
    "a folder": (lambda path: path.mkdir(), IsADirectoryError, "directory"),
    "nothing": (lambda path: None, FileNotFoundError, "No such file"),
}


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    make, error, message = NOT_REGULAR[kind]
    for suffix in (".pt2", ".onnx"):
        path = tmp_path / f"model{suffix}"
        make(path)
        for read in (open_regular, digest_of):
            with pytest.raises(error, match=message):
                read(path)
        with pytest.raises(PackageError, match="there is no such file"):
            read_description(path)


def test_hashed_is_copied(tmp_path: Path) -> None:
    path, copy = tmp_path / "a", tmp_path / "b"
    path.write_bytes(bytes(3 << 20) + b"end")
    assert digest_of(path) == digest_of(path, copy) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert copy.read_bytes() == path.read_bytes()
    os.truncate(path, 2**40)
    with pytest.raises(OSError, match="it has 1099511627776 bytes or more; at most 100 are read"):
        digest_of(path, copy, 100)
    assert copy.stat().st_size == 0


def test_no_foreseeable_names(tiny_package: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """PyTorch's compiler would load shared objects from ``torchinductor_<user>``; ONNX Runtime would write ``.ses``."""
    code = "import sys; from fastgrad.deploy.file.package import ModelPackage; [*map(ModelPackage, sys.argv[1:])]"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    for name in ("TORCHINDUCTOR_CACHE_DIR", "ORT_DISABLE_TELEMETRY"):
        environment.pop(name, None)
    run_python("-c", code, tiny_package, tiny_onnx, env=environment)
    assert list(tmp_path.iterdir()) == []


CACHES: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "nothing yet": (lambda path: None, True),
    "its own": (lambda path: path.mkdir(0o700), True),
    "others may write": (lambda path: (path.mkdir(), path.chmod(0o777)), False),
    "a link": (lambda path: path.symlink_to(path.parent), False),
    "a file": (lambda path: path.touch(), False),
}


@pytest.mark.parametrize("kind", CACHES)
def test_private_compiler_cache(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime import cache_dir_utils

    folder, (make, used) = tmp_path / "torchinductor_user", CACHES[kind]
    make(folder)
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(folder))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))  # as PyTorch itself sets it
    _torch._own_cache()
    chosen = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert (chosen == folder) == used
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o700
    # What the user names is taken.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    _torch._own_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
