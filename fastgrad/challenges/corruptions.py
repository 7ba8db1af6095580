"""Corruptions of unit images ``(B, C, H, W)``: black is 0, white is 1; each takes a strength and a generator.

They are simple on purpose. They stand in for what a deployed network meets, and are not the published
common corruptions, so that a detector trained on these can still be tested on those.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastgrad.challenges.jpeg import recompressed
from fastgrad.ops.dispatch import full_precision


def _uniform(unit: Tensor, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Random numbers drawn on the CPU, so that a seed means the same on every device."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").to(unit)


def noise(unit: Tensor, sigma: float, generator: Generator) -> Tensor:
    """White Gaussian noise of standard deviation ``sigma``."""
    return unit + sigma * torch.randn(unit.shape, generator=generator, dtype=torch.float32, device="cpu").to(unit)


def blur(unit: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Gaussian blur; ``sigma`` in pixels of an image 32 pixels wide, in proportion to the size from 24 pixels on."""
    height, width = unit.shape[-2:]
    # A Gaussian much narrower than a pixel alters nothing.
    pixels = sigma * max(24, min(height, width)) / 32
    # As products with matrices, whose price does not depend on sigma.
    down, along = (_gaussian(length, pixels).to(unit) for length in (height, width))
    with full_precision(unit.device):
        return down @ unit @ along.T


def _gaussian(length: int, pixels: float) -> Tensor:
    """Weights ``(length, length)`` of every position for every blurred one, borders replicated."""
    radius = max(1, math.ceil(3 * pixels))
    steps = torch.arange(-radius, radius + 1, device="cpu")
    taps = torch.exp(-0.5 * (steps.double() / pixels) ** 2)
    # No dark frame that a detector could learn instead of the blur.
    places = (torch.arange(length, device="cpu")[:, None] + steps).clamp(0, length - 1)
    return taps.new_zeros(length, length).scatter_add_(1, places, (taps / taps.sum()).expand(length, -1))


def contrast(unit: Tensor, factor: float, generator: Generator) -> Tensor:
    """Distances from each image's mean multiplied by ``factor``."""
    mean = unit.mean((1, 2, 3), keepdim=True)
    return mean + factor * (unit - mean)


def brightness(unit: Tensor, shift: float, generator: Generator) -> Tensor:
    """``shift`` added to or, with equal chance, subtracted from every pixel of an image."""
    sign = torch.where(_uniform(unit, (unit.shape[0], 1, 1, 1), generator) < 0.5, -1.0, 1.0)
    return unit + shift * sign.to(unit)


def compression(unit: Tensor, quality: float | Tensor, generator: Generator) -> Tensor:
    """One pass through JPEG at ``quality``, one number or one for each image.

    Three channels are colours; any other number are grey images.
    """
    levels = (unit.detach().float() * 255).round()
    with full_precision(unit.device):
        return recompressed(levels, torch.as_tensor(quality, device=unit.device).expand(len(unit))).to(unit) / 255


def shuffle(unit: Tensor, grid: float, generator: Generator) -> Tensor:
    """Each image cut into ``grid`` x ``grid`` patches, which change places; left-over borders stay."""
    batch, channels, height, width = unit.shape
    cells = min(round(grid), height, width)
    h, w = height // cells, width // cells
    inner = unit[:, :, : h * cells, : w * cells]
    patches = inner.reshape(batch, channels, cells, h, cells, w).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, cells * cells, channels, h, w)
    # One random cyclic order per image: no patch keeps its place by chance.
    order = torch.rand((batch, cells * cells), generator=generator, dtype=torch.float32, device="cpu").argsort(1)
    source = torch.empty_like(order).scatter_(1, order, order.roll(1, 1)).to(unit.device)
    moved = patches.gather(1, source[:, :, None, None, None].expand_as(patches))
    moved = moved.view(batch, cells, cells, channels, h, w).permute(0, 3, 1, 4, 2, 5)
    result = unit.clone()
    result[:, :, : h * cells, : w * cells] = moved.reshape(inner.shape)
    return result


def inversion(unit: Tensor, amount: float, generator: Generator) -> Tensor:
    """The negative, blended in by ``amount`` (1 is the plain negative)."""
    return (1 - amount) * unit + amount * (1 - unit)


def mixture(unit: Tensor, share: float, generator: Generator) -> Tensor:
    """Each image mixed with another one of the batch, which keeps ``1 - share``.

    Where the other is the same image, as in a batch of one, its mirror image takes that place.
    """
    order = torch.randperm(unit.shape[0], generator=generator, device="cpu")
    partner = torch.empty_like(order).scatter_(0, order, order.roll(1)).to(unit.device)
    other = unit[partner]
    same = (other == unit).all(dim=(1, 2, 3), keepdim=True)
    return (1 - share) * unit + share * torch.where(same, unit.flip(-1), other)


def phase(unit: Tensor, share: float, generator: Generator) -> Tensor:
    """Fourier phases moved towards random ones, by ``share`` of the way: what is left of an object is its texture.

    All channels move alike, so colours stay together.
    """
    white = _uniform(unit, (unit.shape[0], 1, *unit.shape[-2:]), generator)
    turn = torch.fft.rfft2(white.float()).angle()
    spectrum = torch.fft.rfft2(unit.float()) * torch.polar(torch.ones_like(turn), share * turn)
    turned: Tensor = torch.fft.irfft2(spectrum, s=unit.shape[-2:])
    return turned.to(unit)


def magnification(unit: Tensor, factor: float, generator: Generator) -> Tensor:
    """A random part of each image, enlarged ``factor`` times, as images of a lower resolution are."""
    height, width = unit.shape[-2:]
    h, w = max(1, round(height / factor)), max(1, round(width / factor))
    corners = torch.rand((unit.shape[0], 2), generator=generator, dtype=torch.float32, device="cpu")
    corners *= torch.tensor([height - h + 1, width - w + 1], device="cpu")
    parts = [
        image[:, top : top + h, left : left + w]
        for image, (top, left) in zip(unit, corners.long().tolist(), strict=True)
    ]
    return _resized(torch.stack(parts), (height, width), "bicubic")


def tiling(unit: Tensor, grid: float, generator: Generator) -> Tensor:
    """Each image made small and repeated ``grid`` x ``grid`` times."""
    height, width = unit.shape[-2:]
    cells = min(round(grid), height, width)
    small = _resized(unit, (-(-height // cells), -(-width // cells)), "area")
    return small.repeat(1, 1, cells, cells)[..., :height, :width]


def _resized(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """In another size, computed in float32 at least: not every mode has a half precision everywhere."""
    wide = images if images.dtype == torch.float64 else images.float()
    return F.interpolate(wide, size=size, mode=mode).to(images)
