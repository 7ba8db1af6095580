"""The range from black to white is read from the data or given, and checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_images import MEAN, STD, normalised, photos
from torch import Tensor

from fastgrad.challenges import PixelRange


def test_range_of_the_data() -> None:
    unit = photos()
    for scaled, low, high in ((unit, 0, 1), (unit * 255, 0, 255), (unit * 0.3, 0, 1)):
        pixels = PixelRange.of(scaled)
        assert (float(pixels.low), float(pixels.high)) == (low, high)
    # Levels of four bits or twelve, and what overshoots white or goes below black, are no bytes.
    for ready in (unit * 16, unit * 4095, unit * 1.02, normalised(unit), unit * 2 - 1):
        pixels = PixelRange.of(ready)
        assert torch.equal(pixels.low.flatten(), ready.amin((0, 2, 3)))
        assert torch.equal(pixels.high.flatten(), ready.amax((0, 2, 3)))
    flat = PixelRange.of(torch.full((2, 1, 4, 4), -3.0))
    assert float(flat.high - flat.low) == 1
    # The whole sample decides: the first batch alone would pass for unit images.
    assert float(PixelRange.of([torch.zeros(1, 3, 8, 8), 255 * photos(2)]).high) == 255


def test_range_that_is_given() -> None:
    told = PixelRange.of(2 * photos() - 1, clip=(0, 255), mean=[127.5] * 3, std=[127.5] * 3)
    assert float(told.low[0, 0]) == -1
    assert float(PixelRange.of([photos(), 255 * photos(2)], clip=(0, 255)).high) == 255
    assert bool(torch.isfinite(PixelRange.of(normalised(photos()).half(), mean=MEAN, std=STD).low).all())


@pytest.mark.parametrize(
    ("told", "images", "words"),
    [
        ({"clip": (0, 1)}, [photos(), 255 * photos()], r"range that clip, mean and std give, \[0, 1\]; they reached"),
        ({"mean": MEAN, "std": STD}, [photos() - 3], r"reached \[-3, "),
        ({}, [], "images must hold at least one batch"),
        ({}, [photos()[0]], r"images must have shape \(B, C, H, W\); it was \(3, "),
        ({}, [photos() / 0], "images must be finite"),
        ({}, [photos(), 255 * photos(2)], r"share one range; 6 of 8 lie within \[0, 1\], others reach 25\d"),
    ],
)
def test_range_that_contradicts(told: dict[str, Any], images: list[Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PixelRange.of(images, **told)
    with pytest.raises(TypeError, match="images must"):
        PixelRange.of([*images, None], **told)
