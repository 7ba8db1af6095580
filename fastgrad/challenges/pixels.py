"""Where black and white lie in a batch of images, so that strengths mean the same for every normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad import checks


@dataclass(frozen=True)
class PixelRange:
    """Black and white of every channel; maps images to the unit range and back.

    Attributes:
        low: value of black, broadcastable to ``(B, C, H, W)``.
        high: value of white, of the same shape; above ``low`` everywhere.
    """

    low: Tensor
    high: Tensor

    def to_unit(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` with black at 0 and white at 1, clipped to that range."""
        return ((images - self.low) / (self.high - self.low)).clamp(0, 1)

    def from_unit(self, unit: Tensor) -> Tensor:
        """The inverse of :meth:`to_unit`."""
        return self.low + unit * (self.high - self.low)

    @classmethod
    def of(
        cls,
        images: Tensor,
        *,
        clip: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> PixelRange:
        """The range of ``images`` as told by the arguments, else as read from the data.

        Args:
            images: ``(B, C, H, W)``, floating.
            clip: values of black and white, the same for all channels; with ``mean`` and ``std``, the values
                before normalisation.
            mean: per-channel mean that was subtracted from images whose black is 0 and white 1 (or ``clip``).
            std: per-channel standard deviation by which they were divided afterwards.

        Without any of them: values within [0, 1] are taken as unit images, values within [0, 255] as bytes,
        everything else as normalised, with every channel's own smallest and largest value as its range. A
        constant channel gets a range of width one around its value.

        Raises:
            ValueError: for a lone ``mean`` or ``std``, lengths other than C, or an empty range.
        """
        channels = images.shape[1]
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"clip must be (black, white) with black < white; it was {clip!r}")
        if (mean is None) != (std is None):
            raise ValueError("mean and std must be given together; one of them was None")
        if mean is not None and std is not None:
            for name, values in (("mean", mean), ("std", std)):
                if len(values) != channels:
                    raise ValueError(
                        f"{name} must have one value per channel ({channels}); it had {len(values)}"
                    )
            if min(std) <= 0:
                raise ValueError(f"std must be positive; it was {std!r}")
            shift, scale = (images.new_tensor(list(v)).view(1, -1, 1, 1) for v in (mean, std))
            black, white = clip if clip is not None else (0.0, 1.0)
            return cls((black - shift) / scale, (white - shift) / scale)
        if clip is None and images.numel():
            smallest, largest = images.aminmax()
            if smallest >= 0 and largest <= 255:
                clip = (0.0, 1.0 if largest <= 1 else 255.0)
            else:
                low = images.amin((0, 2, 3), keepdim=True)
                high = images.amax((0, 2, 3), keepdim=True)
                flat = high <= low
                return cls(torch.where(flat, low - 0.5, low), torch.where(flat, high + 0.5, high))
        black, white = clip if clip is not None else (0.0, 1.0)
        return cls(images.new_full((1, 1, 1, 1), black), images.new_full((1, 1, 1, 1), white))


def check_images(images: Tensor) -> None:
    """Raise unless ``images`` is a finite floating tensor ``(B, C, H, W)``."""
    checks.is_float("images", images)
    if images.dim() != 4:
        raise ValueError(f"images must have shape (B, C, H, W); it was {tuple(images.shape)}")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images must be finite; it held NaN or infinity")
