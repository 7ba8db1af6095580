"""What decoding gives, and what it refuses with an error that says what was wrong."""

from __future__ import annotations

import io
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from bad_arguments import refused
from PIL import Image, ImageOps
from serve_client import image, many_scans, png

from fastgrad.deploy.file.images import ImageError, ImageTooLargeError, decode_image, decode_pixels
from fastgrad.deploy.file.package import Description

IMAGES = Description((3, 8, 8), "float32", 4, 8, "cpu", mean=[0.5] * 3, std=[0.25] * 3)
NO_IMAGES = Description((9,), "float32", 4, 8, "cpu")


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ImageError, "the image is empty"),
    ({"content": b"GIF99"}, ImageError, "none of .*PNG"),
    ({"description": NO_IMAGES}, ImageError, "takes no images"),
    ({"content": png(11_000, 1000, 8, 0, b"")}, ImageTooLargeError, "at most 10000000"),
    ({"content": png(20_000, 20_000, 8, 0, b"")}, ImageTooLargeError, "decompression bomb"),
    ({"content": None}, TypeError, "content must be bytes; it was NoneType"),
    ({"description": None}, TypeError, "description must be a Description; it was NoneType"),
    ({"max_pixels": 0}, ValueError, "max_pixels must be an integer of at least 1; it was 0"),
]
test_bad_arguments = refused(
    [(partial(decode_image, **{"content": b"", "description": IMAGES, **given}), *said) for given, *said in BAD]
)


def test_scaling_of_the_centered_part() -> None:
    wide, out = np.zeros((8, 16, 3), dtype=np.uint8), io.BytesIO()
    wide[:, 4:12] = 255
    Image.fromarray(wide).save(out, "PNG")
    # (1 - 0.5) / 0.25: only the white middle is left.
    assert torch.equal(decode_image(out.getvalue(), IMAGES), torch.full((3, 8, 8), 2.0))


def test_time_limit_of_decoding() -> None:
    """A JPEG whose scans each take a pass over the image, of ten megapixels in all."""
    assert decode_pixels(many_scans(100), (3, 8, 8), seconds=60).shape == (3, 8, 8)
    start = time.thread_time()
    with pytest.raises(ImageError, match=r"decoding the image takes more than 0\.1 s"):
        decode_pixels(many_scans(5000, 3000), (3, 8, 8), seconds=0.1)
    assert time.thread_time() - start < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_jpeg_on_its_side(orientation: int) -> None:
    """A decoding at a part of its size comes near to the whole file, upright and scaled at once."""
    squares = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    turned, out = Image.Exif(), io.BytesIO()
    turned[0x0112] = orientation
    picture = Image.fromarray(squares)
    picture.save(out, "JPEG", quality=95, exif=turned)
    for height, width in ((16, 64), (64, 16), (32, 32)):
        whole = ImageOps.fit(ImageOps.exif_transpose(Image.open(out)), (width, height), Image.Resampling.BILINEAR)
        found = decode_pixels(out.getvalue(), (3, height, width)).transpose(1, 2, 0)
        assert np.abs(found - np.asarray(whole, dtype=float)).max() < 20


@pytest.mark.parametrize("most", [200, 1000, 65535])
def test_sixteen_bits(most: int) -> None:
    """A frame of a covered camera is black: at most 200 of 65,535."""
    values = np.random.default_rng(0).integers(0, most + 1, (8, 8), dtype=np.uint16)
    turned, out = Image.Exif(), io.BytesIO()
    turned[0x0112] = 3
    Image.fromarray(values).save(out, "PNG", exif=turned)
    expected = np.floor(values[::-1, ::-1] * (255 / 65535) + 0.5)
    assert (decode_pixels(out.getvalue(), (3, 8, 8)) == expected).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_transparent_colours(shape: tuple[int, ...]) -> None:
    """A warning, which is an error in these tests, would make it an image that cannot be read."""
    palette = Image.open(io.BytesIO(image())).quantize(16)
    files = []
    for options in ({}, {"transparency": bytes(16)}):
        files.append(io.BytesIO())
        palette.save(files[-1], "PNG", **options)
    opaque, transparent = (decode_pixels(file.getvalue(), shape) for file in files)
    assert (opaque == transparent).all()
