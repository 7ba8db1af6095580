"""Corruptions do what they say."""

from __future__ import annotations

import pytest
import torch
from small_images import challenged, photos

from fastgrad.challenges import CHALLENGES, generate_challenges


@pytest.mark.parametrize("size", [3, 8])
def test_blur_alters_small_images(size: int) -> None:
    images = photos(size=size)
    for name, challenge in challenged(None, images, ["blur"]).items():
        assert bool(((challenge - images).abs().amax((1, 2, 3)) > 0.05).all()), name


def test_blur_and_compression() -> None:
    constant = torch.full((1, 3, 32, 32), 0.5)
    made = challenged(None, constant, ["blur", "compression"])
    for name, challenge in made.items():
        # JPEG rounds to bytes.
        assert float((challenge - constant).abs().max()) <= (1e-6 if "blur" in name else 2 / 255)
    rough = photos(size=32)
    roughness = [float(c.diff(dim=-1).square().mean()) for c in challenged(None, rough, ["blur"]).values()]
    assert roughness == sorted(roughness, reverse=True)


def test_shuffle() -> None:
    images = photos(size=16)
    made = challenged(None, images, ["shuffle-2"])["shuffle-2"]
    assert torch.equal(made.flatten(2).sort(2).values, images.flatten(2).sort(2).values)
    patches = (made != images).reshape(6, 3, 4, 4, 4, 4).any(5).any(3).any(1)
    assert bool(patches.all())


def test_phase() -> None:
    grey = (0.4 + 0.2 * photos(channels=1, size=15)).expand(-1, 3, -1, -1)
    made = challenged(None, grey, ["phase-3"], clip=(0, 1))["phase-3"]
    assert bool(((made > 0) & (made < 1)).all())
    spectra = [torch.fft.rfft2(images.double()).abs() for images in (grey, made)]
    torch.testing.assert_close(spectra[1], spectra[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(made[:, 0], made[:, 2])


def test_magnification_and_tiling() -> None:
    ramp = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    made = challenged(None, ramp, ["magnification", "tiling"], clip=(0, 1))
    for level, factor in enumerate(CHALLENGES["magnification"].strengths, 1):
        spread = made[f"magnification-{level}"].amax((1, 2, 3)) - made[f"magnification-{level}"].amin((1, 2, 3))
        assert float(spread.max()) < 1.2 / factor
    for level, cells in enumerate(CHALLENGES["tiling"].strengths, 1):
        tiled = made[f"tiling-{level}"]
        assert torch.equal(tiled, tiled.roll(32 // int(cells), -1))
        torch.testing.assert_close(tiled.mean((1, 2, 3)), ramp.mean((1, 2, 3)), rtol=0, atol=1e-5)


def test_no_image_is_mixed_with_itself() -> None:
    images = photos(4)
    for batch in generate_challenges(None, images, names=["mixture"], each=9):
        assert bool(((batch.inputs - images[batch.sources]).abs().amax((1, 2, 3)) > 0.05).all())
