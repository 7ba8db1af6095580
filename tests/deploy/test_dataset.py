"""Which images there are, and in which order: those of a folder, and those of a Parquet file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serve_client import image

from fastgrad.deploy.dataset import Images, list_folder
from fastgrad.deploy.file.description import Description


def images_of(path: Path, image_column: str | None = None, key: str | None = None) -> Images:
    return Images(path, Description((3, 8, 8), "float32", 4, 8, "cpu"), image_column, key, 10**7, 10**6)


def test_order_of_paths(tmp_path: Path) -> None:
    for name in ("a/1.png", "a-b/1.png", "a.png", "b/c/2.png", "b/c.png", "b/c-d/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, _ = list_folder(tmp_path)
    assert [tmp_path / name for name in found] == sorted(tmp_path.rglob("*.png"))


def test_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images would be missing without a word."""
    (tmp_path / "closed").mkdir()
    plain = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="closed"):
        list_folder(tmp_path)


@pytest.mark.parametrize("batches", [[[0]], [[69, 70, 71], [140]], [[199]], [[5], [3, 4], [150]], [[*range(200)]]])
def test_rows_by_number(batches: list[list[int]], tmp_path: Path) -> None:
    """In any order of batches, as of a run that goes on in several processes."""
    pq.write_table(pa.table({"img": [b"%d" % i for i in range(200)]}), tmp_path / "in.parquet", row_group_size=70)
    images = images_of(tmp_path / "in.parquet")
    assert len(images) == 200
    for numbers in batches:
        assert [name for name, _ in images.__getitems__(numbers)] == list(map(str, numbers))


def test_damaged_page(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"img": [os.urandom(50) for _ in range(200)]}), path, row_group_size=100)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} is damaged in or after row (64|100): "):
        images_of(path).__getitems__([*range(200)])


def test_keys_of_any_type(tmp_path: Path) -> None:
    keys = {"binary": [b"k0", None, b"\xff"], "text": ["k0", None, "\\xff"], "number": [7, None, 9]}
    # Other programs write texts that are no UTF-8.
    keys["latin"] = pa.array(keys["binary"], pa.binary()).view(pa.string())
    names = {key: ["k0", "1", "\\xff"] for key in ("binary", "text", "latin")} | {"number": ["7", "1", "9"]}
    pq.write_table(pa.table({"img": [image()] * 3, **keys}), tmp_path / "in.parquet")
    for key, expected in names.items():
        found = images_of(tmp_path / "in.parquet", None, key).__getitems__([0, 1, 2])
        assert [name for name, _ in found] == expected
        assert all(pixels.shape == (3, 8, 8) for _, pixels in found)


BYTES = pa.array([b""])
NO_BYTES = "must hold bytes, or structs with bytes; it has "


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ({"a": BYTES, "b": BYTES}, (None, None), r"image_column must name the column.*a, b"),
        ({"a": BYTES}, ("c", None), "image_column must be one column of the file's .a.; it was 'c'"),
        ({"image": BYTES}, (None, "c"), "key_column must be one column of the file's .image.; it was 'c'"),
        (pa.Table.from_arrays([BYTES] * 2, ["image", "image"]), (None, None), "the file has image, image"),
        ({"image": pa.array([[1, 2]])}, (None, None), NO_BYTES + "list<"),
        ({"image": pa.array([{"path": "a.png"}])}, (None, None), NO_BYTES + "struct<path"),
        ({"image": pa.array(["a.png"])}, (None, None), NO_BYTES + "string"),
        ({"image": pa.array(["a.png"]).dictionary_encode()}, (None, None), NO_BYTES + "dictionary<values=string"),
    ],
)
def test_columns_that_do_not_fit(columns: Any, names: tuple[Any, Any], message: str, tmp_path: Path) -> None:
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=message):
        images_of(tmp_path / "in.parquet", *names)
