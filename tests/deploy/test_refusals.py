"""What reading of files, decoding and scoring refuse, with an error that says what was wrong."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgrad.deploy.file.images import ImageError, decode_image
from fastgrad.deploy.file.package import Description, PackageError, read_description, write_description
from fastgrad.deploy.score.local import score

DESCRIPTION = Description((3, 8, 8), "float32", 4, 8, "cpu", threshold=1.0, false_alarm_rate=0.05)


def archive(folder: Path, content: dict[str, Any] | None) -> Path:
    """Write an archive that holds ``content`` as its description, or none."""
    path = folder / "model.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/version", "1")
        if content is not None:
            file.writestr("model/extra/fastgrad.json", json.dumps(content))
    return path


def described(folder: Path) -> Path:
    path = archive(folder, None)
    write_description(path, DESCRIPTION)
    return path


BAD: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no description": (lambda f: read_description(archive(f, None)), PackageError, "not written by fastgrad"),
    "format": (lambda f: read_description(archive(f, {"format": 99})), PackageError, "another format than"),
    "damaged": (lambda f: read_description(archive(f, {"format": 1})), PackageError, "inside is damaged"),
    "empty image": (lambda _: decode_image(b"", DESCRIPTION), ImageError, "the image is empty"),
    "no image": (lambda _: decode_image(b"GIF99", DESCRIPTION), ImageError, "none of .*PNG"),
    "no images": (
        lambda _: decode_image(b"", Description((9,), "float32", 4, 8, "cpu")), ImageError, "takes no images"
    ),
    "batch": (lambda f: score(described(f), f, f / "o.parquet", batch=0), ValueError, "batch must be at least 1"),
    "folder": (lambda f: score(described(f), f, f / "no" / "o.parquet"), ValueError, "in an existing folder"),
    "model": (lambda f: score(f / "none.pt2", f, f / "o.parquet"), PackageError, "there is no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_the_error_says_what_was_wrong(case: str, tmp_path: Path) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(tmp_path)
