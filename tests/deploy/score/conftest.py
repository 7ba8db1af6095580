"""What all tests of scoring need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from serve_client import image

for needed in ("pyarrow", "PIL", "tqdm"):
    pytest.importorskip(needed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty good images in two folders, three bad ones, one file that is no image."""
    base = tmp_path / "images"
    (base / "more").mkdir(parents=True)
    for i in range(20):
        place = base / "more" if i % 2 else base
        (place / f"{i:02d}.png").write_bytes(image(i, (8 + i, 9)))
    (base / "bad.jpg").write_bytes(b"not an image")
    (base / "empty.png").write_bytes(b"")
    (base / "short.PNG").write_bytes(image(0, (40, 40))[:100])
    (base / "notes.txt").write_text("no image")
    return base


@pytest.fixture
def run(folder: Path, tiny_package: Path, tmp_path: Path) -> Callable[..., dict[str, int]]:
    """Score these images into ``tmp_path / "o"``; options change that."""
    from fastgrad.deploy.score.local import score

    return lambda **options: score(**{"model_path": tiny_package, "images": folder, "out": tmp_path / "o", **options})
