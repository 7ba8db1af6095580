"""Local statistics of images: what noise, blur, compression and lighting change, whatever the network."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastgrad._torch import is_readable
from fastgrad.losses import compute_dtype

#: Shares of an image's pixels that lie below the quantiles taken.
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
#: Four measures a pixel: roughness along the diagonals and in all directions, first differences, intensity.
STATISTICS = 4 * len(QUANTILES)
# More pixels than these say no more about a quantile; larger images are read on a regular grid.
_PIXELS = 1024
# Contrast this far below an image's own is rounding, which the root would otherwise magnify.
_FLOOR = 1e-8


def image_statistics(images: Tensor) -> Tensor:
    """Quantiles of local contrast and of intensity over the pixels of each image.

    For each pixel the squared mixed difference along the diagonals, the squared Laplacian and the squared
    first differences, averaged over channels, and the intensity. Smooth regions, which every natural image
    has, show noise and compression in the low quantiles; edges show blur and overlays in the high ones
    (noise estimation as in Immerkaer, "Fast noise variance estimation", 1996). The contrasts are given as
    square roots of amplitudes (fourth roots of the squares): near a normal distribution over images and free
    of the singularity that a logarithm has in flat regions.

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
    step = 1
    while -(-(x.shape[2] - 2) // step) * -(-(x.shape[3] - 2) // step) > _PIXELS:
        step += 1

    def shifted(down: int, right: int) -> Tensor:
        rows, columns = x.shape[2] - 2, x.shape[3] - 2
        # In one slice: an exported file copies what each of two would give.
        return x[:, :, 1 + down : 1 + down + rows : step, 1 + right : 1 + right + columns : step]

    centre, below, beside = shifted(0, 0), shifted(1, 0), shifted(0, 1)
    # Differences of neighbours, then their sums: exact zero where neighbours are equal.
    vertical, horizontal = centre - below, centre - beside
    laplacian = vertical + horizontal + (centre - shifted(-1, 0)) + (centre - shifted(0, -1))
    diagonal = vertical - (beside - shifted(1, 1))
    first = torch.cat([_energy(vertical), _energy(horizontal)], 1)
    intensity = centre.mean(1).flatten(1)
    floor = _FLOOR * (intensity - intensity.mean(1, keepdim=True)).square().mean(1, keepdim=True)
    # Side by side, they are sorted in one go.
    mixed, curved, level = _quantiles(
        torch.stack([_energy(diagonal), _energy(laplacian), intensity])
    ).unbind()
    contrasts = [(quantiles + floor).sqrt().sqrt() for quantiles in (mixed, curved, _quantiles(first))]
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


def _quantiles(values: Tensor) -> Tensor:
    """``(..., n)`` to ``(..., 7)``, interpolated as `torch.quantile` does, without its limit on size."""
    ordered = _sorted(values)
    places = [share * (values.shape[-1] - 1) for share in QUANTILES]
    lower = torch.tensor([int(place) for place in places], device=values.device)
    upper = torch.tensor([math.ceil(place) for place in places], device=values.device)
    weight = torch.tensor([place % 1 for place in places], dtype=values.dtype, device=values.device)
    low = ordered.index_select(-1, lower)
    return low + weight * (ordered.index_select(-1, upper) - low)


def _sorted(values: Tensor) -> Tensor:
    """Rows in ascending order, NaN last. On a CPU PyTorch takes twenty times as long for it as NumPy."""
    if is_readable(values) and values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return torch.sort(values, dim=-1).values
