"""What decoding refuses, with an error that says what was wrong."""

from __future__ import annotations

import pytest

from fastgrad.deploy.file.images import ImageError, decode_image
from fastgrad.deploy.file.package import Description


@pytest.mark.parametrize(
    ("shape", "content", "message"),
    [((3, 8, 8), b"", "the image is empty"), ((3, 8, 8), b"GIF99", "none of .*PNG"), ((9,), b"", "takes no images")],
)
def test_the_error_says_what_was_wrong(shape: tuple[int, ...], content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(content, Description(shape, "float32", 4, 8, "cpu"))
