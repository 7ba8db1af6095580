"""JPEG as tensor operations against libjpeg."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.challenges import jpeg
from fastgrad.challenges.jpeg import recompressed


def by_libjpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Write and read images ``(B, C, H, W)`` with Pillow."""
    image = pytest.importorskip("PIL.Image")
    read = []
    for picture, level in zip(images.byte(), quality.tolist(), strict=True):
        array = picture.permute(1, 2, 0).squeeze(-1).numpy()
        content = io.BytesIO()
        image.fromarray(array).save(content, "JPEG", quality=level)
        with image.open(content) as found:
            read.append(torch.frombuffer(bytearray(found.tobytes()), dtype=torch.uint8).view(array.shape))
    stacked = torch.stack(read)
    return (stacked.permute(0, 3, 1, 2) if stacked.dim() == 4 else stacked.unsqueeze(1)).float()


def images(channels: int, size: int) -> Tensor:
    """Return smooth images with some noise, ``(16, channels, size, size)`` of whole levels."""
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(16, channels, 9, 9, generator=generator), size=size, mode="bicubic")
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1).mul(255).round()


@pytest.mark.parametrize("quality", [10, 50, 80])
def test_coefficients_of_grey_images_are_those_of_libjpeg(quality: int) -> None:
    x, qualities = images(1, 32), torch.full((16,), quality)
    steps = jpeg._quantization(qualities, 0)[0].flatten()

    def coefficients(pixels: Tensor) -> Tensor:
        blocks = (pixels - 128).view(16, 4, 8, 4, 8).transpose(2, 3).reshape(-1, 64).double()
        return (blocks @ jpeg._cosines().T / steps).round()

    other = coefficients(by_libjpeg(x, qualities)) != coefficients(recompressed(x, qualities))
    # libjpeg rounds a coefficient to eighths before it divides: so many lie on the other side of a step's middle.
    assert other.double().mean() < (1 / (8 * steps)).mean()


@pytest.mark.parametrize("size", [8, 32, 37])
def test_colours_are_those_of_libjpeg(size: int) -> None:
    x, qualities = images(3, size), torch.full((16,), 75)
    found, expected = recompressed(x, qualities), by_libjpeg(x, qualities)
    assert found.shape == x.shape
    # One coefficient in 8 q is off by one step q; colour differences count up to 1.772 times. A pixel is rounded.
    luma, chroma = (float(jpeg._quantization(qualities, table)[0].mean() / 8) ** 0.5 for table in (0, 1))
    error = (found - expected).square().mean().sqrt()
    assert error < luma + 1.772 * chroma + 1
    assert error < 0.2 * (expected - x).square().mean().sqrt()


def test_other_numbers_of_channels_are_grey_images() -> None:
    x = torch.randint(0, 256, (2, 4, 16, 8), generator=torch.Generator().manual_seed(1)).float()
    together = recompressed(x, torch.tensor([30, 90]))
    alone = [recompressed(channel, torch.tensor([30, 90])) for channel in x.split(1, 1)]
    assert torch.equal(together, torch.cat(alone, 1))
    assert ((together >= 0) & (together <= 255)).all()
