"""Score a folder of images into one table: ``fastgrad score`` from Python."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow.parquet
from PIL import Image
from small_model import digits, export

from fastgrad.deploy.score import score


def main() -> None:
    """Write twenty images, score them, print the first lines."""
    images = (digits()[0][1500:1520] * 255).byte().permute(0, 2, 3, 1).numpy()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(root / "images" / f"{number:03}.png")
        score(export(root / "model.pt2"), root / "images", root / "scores")
        table = pyarrow.parquet.read_table(root / "scores")
        print(table.column_names)
        print(table.slice(0, 3).to_pylist())


if __name__ == "__main__":
    main()
