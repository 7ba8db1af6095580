"""Corruptions of unit images ``(B, C, H, W)``: black is 0, white is 1; each takes a strength and a generator.

They are simple stand-ins for what a deployed network meets. They differ from the published common corruptions, so that
a detector trained on these can still be tested on those.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastgrad.challenges.jpeg import recompressed
from fastgrad.ops.dispatch import full_precision


def _uniform(unit: Tensor, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw uniform random numbers on the CPU, so that a seed means the same on every device."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu").to(unit)


def noise(unit: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Add white Gaussian noise of standard deviation ``sigma``."""
    return unit + sigma * torch.randn(unit.shape, generator=generator, dtype=torch.float32, device="cpu").to(unit)


def blur(unit: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Blur with a Gaussian; ``sigma`` is in pixels of a 32-pixel image, in proportion to the size from 24 pixels on."""
    height, width = unit.shape[-2:]
    # Not less than for 24 pixels: a Gaussian much narrower than a pixel alters nothing.
    pixels = sigma * max(24, min(height, width)) / 32
    # The price of products with matrices does not depend on sigma.
    down, along = (_gaussian(length, pixels).to(unit) for length in (height, width))
    with full_precision(unit.device):
        return down @ unit @ along.T


def _gaussian(length: int, pixels: float) -> Tensor:
    """Return the weights ``(length, length)`` of every position for every blurred one, with borders replicated."""
    radius = max(1, math.ceil(3 * pixels))
    steps = torch.arange(-radius, radius + 1, device="cpu")
    taps = torch.exp(-0.5 * (steps.double() / pixels) ** 2)
    # Replicated borders leave no dark frame that a detector could learn instead of the blur.
    places = (torch.arange(length, device="cpu")[:, None] + steps).clamp(0, length - 1)
    return taps.new_zeros(length, length).scatter_add_(1, places, (taps / taps.sum()).expand(length, -1))


def contrast(unit: Tensor, factor: float, generator: Generator) -> Tensor:
    """Multiply distances from each image's mean by ``factor``."""
    mean = unit.mean((1, 2, 3), keepdim=True)
    return mean + factor * (unit - mean)


def brightness(unit: Tensor, shift: float, generator: Generator) -> Tensor:
    """Add ``shift`` to every pixel of an image or, with equal chance, subtract it."""
    sign = torch.where(_uniform(unit, (unit.shape[0], 1, 1, 1), generator) < 0.5, -1.0, 1.0)
    return unit + shift * sign.to(unit)


def compression(unit: Tensor, quality: float | Tensor, generator: Generator) -> Tensor:
    """Pass images through JPEG at ``quality``, one number or one for each image.

    Three channels count as colours; any other number counts as separate grey images.
    """
    levels = (unit.detach().float() * 255).round()
    with full_precision(unit.device):
        return recompressed(levels, torch.as_tensor(quality, device=unit.device).expand(len(unit))).to(unit) / 255


def shuffle(unit: Tensor, grid: float, generator: Generator) -> Tensor:
    """Cut each image into ``grid`` x ``grid`` patches and exchange their places; left-over borders stay."""
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
    """Blend in the negative by ``amount`` (1 is the plain negative)."""
    return (1 - amount) * unit + amount * (1 - unit)


def mixture(unit: Tensor, share: float, generator: Generator) -> Tensor:
    """Mix each image, which keeps ``1 - share``, with another image of the batch.

    If the other is the same image, as in a batch of one, its mirror image takes that place.
    """
    order = torch.randperm(unit.shape[0], generator=generator, device="cpu")
    partner = torch.empty_like(order).scatter_(0, order, order.roll(1)).to(unit.device)
    other = unit[partner]
    same = (other == unit).all(dim=(1, 2, 3), keepdim=True)
    return (1 - share) * unit + share * torch.where(same, unit.flip(-1), other)


def phase(unit: Tensor, share: float, generator: Generator) -> Tensor:
    """Move Fourier phases towards random ones, by ``share`` of the way: what is left of an object is its texture.

    The phases of all channels move alike, so colours stay together.
    """
    white = _uniform(unit, (unit.shape[0], 1, *unit.shape[-2:]), generator)
    turn = torch.fft.rfft2(white.float()).angle()
    spectrum = torch.fft.rfft2(unit.float()) * torch.polar(torch.ones_like(turn), share * turn)
    turned: Tensor = torch.fft.irfft2(spectrum, s=unit.shape[-2:])
    return turned.to(unit)


def magnification(unit: Tensor, factor: float, generator: Generator) -> Tensor:
    """Enlarge a random part of each image ``factor`` times, like an image of lower resolution."""
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
    """Shrink each image and repeat it ``grid`` x ``grid`` times."""
    height, width = unit.shape[-2:]
    cells = min(round(grid), height, width)
    small = _resized(unit, (-(-height // cells), -(-width // cells)), "area")
    return small.repeat(1, 1, cells, cells)[..., :height, :width]


def _resized(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize in at least float32: not every mode supports half precision on every device."""
    wide = images if images.dtype == torch.float64 else images.float()
    return F.interpolate(wide, size=size, mode=mode).to(images)
