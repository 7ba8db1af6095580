"""Names that may lead to something else by now, and names that other users of the machine can foresee."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from python_process import run_python

from fastgrad._torch import private_cache
from fastgrad.deploy.file.opening import digest_of, open_regular
from fastgrad.deploy.file.package import PackageError, read_description

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


@pytest.mark.parametrize("name", ["tiny.pt2", "tiny.onnx"])
def test_export_uses_no_name_that_others_foresee(name: str, exports: Path, request: pytest.FixtureRequest) -> None:
    file = request.getfixturevalue(name.replace(".", "_").replace("pt2", "package"))  # made as watched_export says
    (planted,) = (exports / f"temporary{file.suffix}").iterdir()
    assert planted.read_text() == "#error planted"
    names = json.loads(file.with_suffix(".json").read_text())
    # Those of `tempfile`, and of PyTorch's compiler, which makes them in the same way.
    assert [found for found in names if not re.fullmatch(r"(tmp)?[a-z0-9_]{8}", found)] == []
    assert names


def test_compiler_cache_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with private_cache():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with private_cache():
        own = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        with private_cache():
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own)
        assert own.stat().st_mode & 0o077 == 0
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert not own.exists()
