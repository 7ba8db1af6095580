"""Find black and white in a sample of images, so that strengths mean the same for every normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad import checks

#: Values may exceed the range by this share of it, because a normalisation in half precision rounds.
_ROUNDING = 0.01


@dataclass(frozen=True)
class PixelRange:
    """Black and white of every channel; maps images to the unit range and back.

    Attributes:
        low: value of black, broadcastable to ``(B, C, H, W)``.
        high: value of white, of the same shape; above ``low`` everywhere.
    """

    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        """Refuse values that are not a range."""
        checks.is_float("low", self.low)
        checks.is_float("high", self.high)
        checks.same_device("high", self.high, "low", self.low)
        checks.shape_is("high", self.high, tuple(self.low.shape), "that of low")
        if not bool((self.low < self.high).all()):
            raise ValueError(f"low must be below high everywhere; they were {_words(self.low, self.high)}")

    def to_unit(self, images: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` with black at 0 and white at 1, clipped to that range."""
        return ((images - self.low) / (self.high - self.low)).clamp(0, 1)

    def from_unit(self, unit: Tensor) -> Tensor:
        """Return unit images in the original range, the inverse of :meth:`to_unit`."""
        return self.low + unit * (self.high - self.low)

    @classmethod
    def of(
        cls,
        images: Tensor | Sequence[Tensor],
        *,
        clip: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> PixelRange:
        """Return the range of a whole sample: what the arguments say, checked, or else what the images show.

        Args:
            images: ``(B, C, H, W)``, floating, or batches of such images; the whole sample.
            clip: values of black and white, the same for all channels; with ``mean`` and ``std``, the values
                before normalisation.
            mean: per-channel mean that was subtracted from images whose black is 0 and white 1 (or ``clip``).
            std: per-channel standard deviation by which they were divided afterwards.

        Without these arguments, values within [0, 1] are unit images. Values are bytes if none is negative and the
        largest is above 16 and at most 255. All others are normalised images, and a channel's range is from its
        smallest to its largest value. A constant channel gets a range of width one around its value.

        Raises:
            TypeError: ``images`` holds no floating tensors.
            ValueError: For other shapes, a lone ``mean`` or ``std``, lengths other than C, or an empty range. Also for
                images outside the given range by more than a hundredth of it, or a mixture of bytes and unit images.
        """
        batches = checks.tensors("images", images)
        if not batches:
            raise ValueError("images must hold at least one batch; they held none")
        for batch in batches:
            check_images(batch)
        like, declared = batches[0], _declared_range(batches[0], clip, mean, std)
        filled = [batch for batch in batches if batch.numel()]
        if not filled:
            return declared or cls(like.new_zeros((1, 1, 1, 1)), like.new_ones((1, 1, 1, 1)))
        # For each image, because a loader may mix ranges.
        smallest = torch.cat([batch.amin((2, 3)) for batch in filled])
        largest = torch.cat([batch.amax((2, 3)) for batch in filled])
        low, high = (value.view(1, -1, 1, 1) for value in (smallest.amin(0), largest.amax(0)))
        if declared is not None:
            room = _ROUNDING * (declared.high - declared.low)
            if bool((low < declared.low - room).any()) or bool((high > declared.high + room).any()):
                raise ValueError(
                    f"images must lie in the range that clip, mean and std give, "
                    f"{_words(declared.low, declared.high)}; they reached {_words(low, high)}"
                )
            return declared
        # A largest value in (1, 16] is an overshoot or four bits: a whole sample of bytes has brighter pixels.
        if low.min() < 0 or 1 < high.max() <= 16 or high.max() > 255:
            flat = high <= low
            return cls(torch.where(flat, low - 0.5, low), torch.where(flat, high + 0.5, high))
        white = 1.0 if high.max() <= 1 else 255.0
        pale = ((largest.amax(1) <= 1) & (largest.amax(1) > smallest.amin(1))).sum()
        if white == 255 and pale:
            raise ValueError(
                f"images must share one range; {int(pale)} of {len(largest)} lie within [0, 1], others reach "
                f"{float(high.max()):g}: give clip=(black, white) if that is meant"
            )
        return cls(like.new_zeros((1, 1, 1, 1)), like.new_full((1, 1, 1, 1), white))


def _declared_range(
    like: Tensor, clip: tuple[float, float] | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> PixelRange | None:
    """Return the range that the arguments give, or None."""
    channels = like.shape[1]
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together; one of them was None")
    for name, values, count in (("clip", clip, 2), ("mean", mean, channels), ("std", std, channels)):
        if values is not None and checks.to_array(name, values).shape != (count,):
            meaning = "black and white" if name == "clip" else "one per channel"
            raise ValueError(f"{name} must have {count} values, {meaning}; it was {values!r}")
    black, white = map(float, (0, 1) if clip is None else clip)
    if not black < white:
        raise ValueError(f"clip must be (black, white) with black < white; it was {clip!r}")
    if mean is None or std is None:
        if clip is None:
            return None
        return PixelRange(like.new_full((1, 1, 1, 1), black), like.new_full((1, 1, 1, 1), white))
    if min(std) <= 0:
        raise ValueError(f"std must be positive; it was {std!r}")
    shift, scale = (like.new_tensor(list(v)).view(1, -1, 1, 1) for v in (mean, std))
    return PixelRange((black - shift) / scale, (white - shift) / scale)


def _words(low: Tensor, high: Tensor) -> str:
    return f"[{float(low.min()):.4g}, {float(high.max()):.4g}]"


def check_images(images: Tensor, name: str = "images") -> None:
    """Raise unless ``images`` is a finite floating tensor ``(B, C, H, W)``."""
    checks.is_float(name, images)
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(f"{name} must have shape (B, C, H, W); it was {tuple(images.shape)}")
    checks.holds_values(name, images)
    checks.has_float64(name, images)
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{name} must be finite; it held NaN or infinity")
