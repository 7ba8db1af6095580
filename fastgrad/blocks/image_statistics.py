"""Local statistics of images: what noise, blur, compression and lighting change, whatever the network."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrad.blocks.local_contrast import QUANTILES, differences, quantiles
from fastgrad.losses import compute_dtype

#: Four measures a pixel: roughness along the diagonals and in all directions, first differences, intensity.
STATISTICS = 4 * len(QUANTILES)
# More pixels than these say no more about a quantile; larger images are read on a regular grid.
_PIXELS = 1024
# Contrast this far below an image's own is rounding, which the root would otherwise magnify.
_FLOOR = 1e-8


def image_statistics(images: Tensor) -> Tensor:
    """Quantiles of local contrast and of intensity over the pixels of each image.

    For each pixel the squared mixed difference along the diagonals, the squared Laplacian and the squared
    first differences, averaged over channels, and the intensity (see `fastgrad.blocks.local_contrast`). The contrasts
    are given as square roots of amplitudes (fourth roots of the squares): near a normal distribution over images and
    free of the singularity that a logarithm has in flat regions.

    Args:
        images: ``(B, C, H, W)`` floating, H and W at least 3, pixels or normalized inputs.

    Returns:
        ``(B, 28)`` in at least float32, in units of the root of the input's for the first 21, in the input's
        for the last 7.

    Raises:
        ValueError: ``images`` has another rank, dtype or fewer than 3 x 3 pixels.
    """
    if not is_image(images):
        kind = f"{tuple(images.shape)}, {images.dtype}"
        raise ValueError(f"images must be floating, (B, C, H, W) with H and W at least 3; it was {kind}")
    x = images.detach().to(compute_dtype(images.dtype))
    found = differences(x, _PIXELS)
    first = torch.cat([_energy(found.vertical), _energy(found.horizontal)], 1)
    intensity = found.centre.mean(1).flatten(1)
    floor = _FLOOR * (intensity - intensity.mean(1, keepdim=True)).square().mean(1, keepdim=True)
    # Side by side, they are sorted in one go.
    mixed, curved, level = quantiles(
        torch.stack([_energy(found.diagonal), _energy(found.laplacian), intensity])
    ).unbind()
    contrasts = [(values + floor).sqrt().sqrt() for values in (mixed, curved, quantiles(first))]
    return torch.cat([*contrasts, level], 1)


def is_image(value: object) -> bool:
    """Whether `image_statistics` takes ``value``."""
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and value.is_floating_point()
        and min(value.shape[2:]) >= 3
        and value.shape[1] > 0
    )


def _energy(values: Tensor) -> Tensor:
    """Mean square over channels: ``(B, C, h, w)`` to ``(B, h * w)``."""
    return values.square().mean(1).flatten(1)
