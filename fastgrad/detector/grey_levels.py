"""One grey level: how little an image may change before a detector says so.

Images of one source often share exact values, such as a background of 0. A detector that is fitted on them alone flags
every image that is brighter by one grey level, which nobody can see. So half of the clean images that a fit reads are
shifted by a constant of up to one level. On digits this lowers the share flagged after such a shift from .96 to .04,
and costs nothing in attacks; a detector without challenges loses some of them, from .917 to .898 (mean AUROC, a small
network of CIFAR-10). Noise of one level is not added: small attacks are noise of that size, and PGD at 2/255 fell from
.700 to .490 (AUROC, CIFAR-10).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgrad.challenges import PixelRange
from fastgrad.detector import constants


def level_of(pixels: PixelRange) -> Tensor:
    """Return one grey level of every channel, broadcastable to images."""
    return (pixels.high - pixels.low) / constants.LEVELS


def shifts(count: int, seed: int) -> Tensor:
    """Return the shift of each of ``count`` sources in grey levels, ``(count,)``: 0 for half, else within 1 of it."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 2 * torch.rand(count, generator=generator, dtype=torch.float32, device="cpu") - 1
    chosen = torch.randperm(count, generator=generator, device="cpu") < round(constants.SHIFTED * count)
    return torch.where(chosen, sizes, 0.0)


def shifted(images: Tensor, levels: Tensor | float, pixels: PixelRange) -> Tensor:
    """Return ``images`` ``(B, C, H, W)`` plus ``levels``, a number or broadcastable to them, in their dtype."""
    return (images + levels * level_of(pixels).to(images.device)).to(images.dtype)


def sensitivity(images: Tensor, pixels: PixelRange, flagged: Callable[[Tensor], Tensor], seed: int) -> dict[str, float]:
    """Return the shares of ``images`` that are flagged unchanged, one level brighter or darker, and with such noise.

    The noise is uniform within one level, in each value. ``flagged`` gives ``(B,)`` of bool.
    """
    images, generator = images[: constants.TRIED], torch.Generator().manual_seed(seed)
    noise = torch.rand(images.shape, generator=generator, dtype=torch.float32, device="cpu")
    changes: dict[str, Tensor | float] = {
        "unchanged": 0.0, "one grey level brighter": 1.0, "one darker": -1.0, "noise of one": 2 * noise - 1,
    }  # fmt: skip
    return {name: float(flagged(shifted(images, x, pixels)).double().mean()) for name, x in changes.items()}
