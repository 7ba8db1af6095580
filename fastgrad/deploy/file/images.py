"""From the bytes of an image file to a network's input, with limits that hostile files cannot get around."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrad.checks import extra
from fastgrad.deploy.file.package import Description

# Reads what browsers and cameras write. Pillow knows some fifty more, several of them rarely exercised
# parsers.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 50_000_000


class ImageError(ValueError):
    """The bytes are not an image that can be read."""


class ImageTooLargeError(ImageError):
    """The image has more pixels than allowed."""


def decode_image(content: bytes, description: Description, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode, crop to the network's shape of frame, scale, normalize.

    The largest centered rectangle of the network's aspect ratio is scaled to its input size (bilinear,
    antialiased); an image that has this size already is left as it is. The orientation a camera noted is
    applied.

    Args:
        content: a BMP, GIF (first frame), JPEG, PNG, PPM, TIFF or WebP file.
        description: of the model; its input must be ``(1 or 3, H, W)``.
        max_pixels: refuse larger images by their header, before any pixel is decoded.

    Returns:
        ``input_shape``, of the model's dtype.

    Raises:
        ImageTooLargeError: more than ``max_pixels``.
        ImageError: not an image, a truncated one, or the model takes no images.
    """
    with extra("serve"):
        from PIL import Image, ImageOps, UnidentifiedImageError

    shape = description.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ImageError(f"this model takes no images: its inputs have shape {shape}")
    channels, height, width = shape
    if not content:
        raise ImageError("the image is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height}"
                    raise ImageTooLargeError(f"the image has {size} pixels; at most {max_pixels} are allowed")
                # JPEG files are decoded at half, a quarter or an eighth where that is enough.
                image.draft("RGB" if channels == 3 else "L", (2 * width, 2 * height))
                upright: Any = ImageOps.exif_transpose(image)
                if upright.mode in ("I", "I;16", "I;16B", "F"):
                    upright = _to_eight_bits(upright)
                upright = upright.convert("L" if channels == 1 else "RGB")
        if upright.size != (width, height):
            scale = min(upright.width / width, upright.height / height)
            left, top = (upright.width - width * scale) / 2, (upright.height - height * scale) / 2
            right, bottom = left + width * scale, top + height * scale
            upright = upright.resize(
                (width, height),
                Image.Resampling.BILINEAR,
                box=(max(left, 0), max(top, 0), min(right, upright.width), min(bottom, upright.height)),
            )
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"the image cannot be read: it is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(str(error)) from None
    except Exception as error:
        # Damaged files make Pillow's readers raise almost anything: OSError, SyntaxError, struct.error,
        # KeyError.
        raise ImageError(f"the image cannot be read: {str(error).strip() or type(error).__name__}") from None
    pixels = torch.from_numpy(np.array(upright, dtype=np.uint8)).view(height, width, channels)
    dtype = getattr(torch, description.input_dtype)
    return description.normalize(pixels.permute(2, 0, 1).to(dtype) / 255).contiguous()


def _to_eight_bits(image: Any) -> Any:
    """Sixteen-bit and float gray images, which Pillow's convert would clip at 255."""
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    highest = 65535.0 if values.max(initial=0) > 255 else 255.0
    return Image.fromarray((values.clip(0, highest) * (255.0 / highest)).round().astype(np.uint8), "L")
