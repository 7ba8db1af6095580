"""Turn the bytes of an image file into a network's input, with limits that hostile files cannot evade.

`decode_pixels` needs only NumPy and Pillow, so that a process that only decodes stays small.
"""

from __future__ import annotations

import io
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from fastgrad.deploy.file.description import Description

#: What browsers and cameras write. Pillow reads about fifty more, some with rarely tested parsers.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 10_000_000
#: Bytes that are decoded at once; the time limit is checked in between. A scan of a JPEG takes a pass over the whole
#: image and may have some thirty bytes.
_BLOCK = 2**11
Array = np.ndarray[Any, np.dtype[np.uint8]]


class ImageError(ValueError):
    """The bytes are not an image that can be read."""


class ImageTooLargeError(ImageError):
    """The image has more pixels than allowed, or decoding it needs more memory."""


def decode_image(content: bytes, description: Description, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image, crop it to the network's aspect ratio, scale and normalize it.

    The largest centered rectangle of the network's aspect ratio is scaled to its input size (bilinear, antialiased).
    An image of this size is not scaled. The orientation in the EXIF data is applied.

    Args:
        content: A JPEG, PNG or WebP file.
        description: That of the model, whose input must be ``(1 or 3, H, W)``.
        max_pixels: Larger images are refused by their header, before any pixel is decoded.

    Returns:
        A tensor of ``input_shape`` in the model's dtype: pixels from 0 to 1, normalized by the description.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or ``max_pixels`` is below 1.
        ImageTooLargeError: The image has more than ``max_pixels``.
        ImageError: The content is not a whole image, or the model takes no images.
    """
    import torch

    from fastgrad.checks import at_least, extra, is_a
    from fastgrad.deploy.file.description import Description, normalize_pixels

    with extra("serve"):
        import PIL  # noqa: F401

    given: object = content
    if not isinstance(given, (bytes, bytearray, memoryview)):
        raise TypeError(f"content must be bytes; it was {type(given).__name__}")
    is_a(Description, description=description)
    at_least(1, max_pixels=max_pixels)
    pixels = torch.from_numpy(decode_pixels(content, description.input_shape, max_pixels=max_pixels))
    return normalize_pixels(description, pixels)


def require_images(shape: tuple[int, ...]) -> None:
    """Raise ImageError unless this is the shape of an image, ``(1 or 3, H, W)``."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ImageError(f"this model takes no images: its inputs have shape {tuple(shape)}")


class _Timed(io.BytesIO):
    """Bytes whose reading raises ImageError after this thread has computed for another ``seconds``."""

    def __init__(self, content: bytes, seconds: float) -> None:
        super().__init__(content)
        self._seconds, self._end = seconds, time.thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end:
            raise ImageError(f"decoding the image takes more than {self._seconds:g} s")
        return super().read(size)


def decode_pixels(
    content: bytes, shape: tuple[int, ...], *, max_pixels: int = MAX_PIXELS, seconds: float = math.inf
) -> Array:
    """Decode, crop and scale to ``shape``, uint8, as `decode_image` does, without normalization.

    ImageError also if a JPEG or PNG takes more than ``seconds`` of this thread's computing time.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    require_images(shape)
    channels, height, width = shape
    if not content:
        raise ImageError("the image is empty")
    try:
        with Image.open(_Timed(content, seconds), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise ImageTooLargeError(f"the image has {size} pixels; at most {max_pixels} are allowed")
            image.decodermaxblock = _BLOCK
            # JPEG files are decoded at a half, a quarter or an eighth of their size if that suffices either way up.
            least = 2 * max(width, height)
            image.draft("RGB" if channels == 3 else "L", (least, least))
            upright: Any = ImageOps.exif_transpose(image)
            # Transparency is dropped anyway; Pillow would warn of palettes with it, and the caller may raise warnings.
            upright.info.pop("transparency", None)
            if upright.mode == "I;16":
                # Scaled by 255 / 65535 and rounded; Pillow's convert would clip at 255.
                upright = Image.fromarray(((np.asarray(upright).astype(np.int32) + 128) // 257).astype(np.uint8))
            upright = upright.convert("L" if channels == 1 else "RGB")
        upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"the image cannot be read: it is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(str(error)) from None
    except MemoryError:
        raise ImageTooLargeError("decoding the image needs more memory than is allowed") from None
    except Exception as error:
        # Damaged files make Pillow's readers raise almost anything: OSError, SyntaxError, struct.error, KeyError.
        reason = (str(error).strip() or type(error).__name__)[:200]
        raise ImageError(f"the image cannot be read: {reason}") from None
    pixels = np.array(upright, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
