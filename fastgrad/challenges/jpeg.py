"""The effect of JPEG on pixels, as tensor operations: the steps of the standard that lose information.

ITU-T T.81 with the tables of its Annex K, scaled by quality as libjpeg does; colour at half resolution (4:2:0). The
rest of a codec is lossless and changes no pixel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Quantization tables of luminance and of chrominance at quality 50.
_TABLES = (
    (16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
     14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
     49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
    (17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
     47, 66, 99, 99, 99, 99, 99, 99, *[99] * 32),
)  # fmt: skip
#: Rows: luminance, blue and red difference. Columns: red, green and blue.
_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def recompressed(levels: Tensor, quality: Tensor) -> Tensor:
    """Return images ``(B, C, H, W)`` of whole levels 0 to 255 as they come out of JPEG; ``quality`` is ``(B,)``.

    Three channels count as colours; any other number counts as separate grey images. Chrominance is interpolated, as
    libjpeg does in images of more than four columns.
    """
    x = levels.float()
    if x.shape[1] != 3:
        tables = _quantization(quality, 0).to(x)
        return torch.cat([_plane(channel, tables) for channel in x.split(1, 1)], 1).to(levels)
    x = F.conv2d(x, x.new_tensor(_YCC).view(3, 3, 1, 1))
    x[:, 1:] += 128
    x.round_()
    luma = _plane(x[:, :1], _quantization(quality, 0).to(x))
    chroma = _plane(_halved(x[:, 1:]), _quantization(quality, 1).to(x))
    chroma = _doubled(chroma[..., : (x.shape[3] + 1) // 2])[..., : x.shape[2], : x.shape[3]] - 128
    rgb = F.conv2d(torch.cat([luma, chroma], 1), x.new_tensor(_RGB).view(3, 3, 1, 1))
    return rgb.round_().clamp_(0, 255).to(levels)


def _quantization(quality: Tensor, table: int) -> Tensor:
    """Return the divisors ``(B, 8, 8)`` of an image's blocks."""
    quality = quality.double()
    scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    base = torch.tensor(_TABLES[table], device=quality.device).view(8, 8)
    return ((base * scale.view(-1, 1, 1) + 50) / 100).floor().clamp(1, 255)


def _plane(plane: Tensor, tables: Tensor) -> Tensor:
    """Transform, quantize and return planes ``(B, C, H, W)``, each 8 x 8 block by itself."""
    batch, _, height, width = plane.shape
    padded = F.pad(plane, (0, -width % 8, 0, -height % 8), mode="replicate") - 128
    high, wide = padded.shape[2] // 8, padded.shape[3] // 8
    blocks = padded.view(batch, -1, high, 8, wide, 8).transpose(3, 4).reshape(batch, -1, 64)
    dct, tables = _cosines().to(plane), tables.view(batch, 1, 64)
    steps = blocks @ dct.T / tables
    # Round halves, which are frequent, away from zero.
    kept = steps.add_(torch.sign(steps).mul_(0.5)).trunc_().mul_(tables)
    pixels = (kept @ dct).add_(128).round_().clamp_(0, 255).view(batch, -1, high, wide, 8, 8)
    return pixels.transpose(3, 4).reshape(batch, -1, 8 * high, 8 * wide)[..., :height, :width]


def _cosines() -> Tensor:
    """Return the transform of a block's 64 pixels, ``(64, 64)``; exact where coefficients are multiples of 1/8."""
    place = torch.arange(8, dtype=torch.float64, device="cpu")
    cosines = torch.cos(math.pi * (2 * place + 1) * place.unsqueeze(1) / 16) / 2
    cosines[0] /= math.sqrt(2)
    return torch.kron(cosines, cosines)


def _halved(plane: Tensor) -> Tensor:
    """Return the means of 2 x 2 pixels, of whole blocks; halves round up in every other column, as in libjpeg."""
    plane = F.pad(plane, (0, -plane.shape[3] % 16, 0, plane.shape[2] % 2), mode="replicate")
    bias = torch.arange(plane.shape[3] // 2, dtype=plane.dtype, device=plane.device) % 2 * 0.25 + 0.25
    return (F.avg_pool2d(plane, 2) + bias).floor()


def _doubled(plane: Tensor) -> Tensor:
    """Return a plane of twice the size: three quarters of the nearest pixel and one of the next, each axis."""
    for axis in (2, 3):
        length = plane.shape[axis]
        edge = torch.arange(-1, length + 1, device=plane.device).clamp(0, length - 1)
        wide = plane.index_select(axis, edge)
        near = 3 * plane
        lower, upper = near + wide.narrow(axis, 0, length), near + wide.narrow(axis, 2, length)
        plane = torch.stack([lower, upper], axis + 1).flatten(axis, axis + 1) / 4
    halves = 8 / 16 - torch.arange(plane.shape[3], dtype=plane.dtype, device=plane.device) % 2 / 16
    return (plane + halves).floor()
