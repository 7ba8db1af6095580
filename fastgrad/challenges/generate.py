"""A seeded set of challenges from a model and clean images alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Generator, Tensor, nn

from fastgrad import checks
from fastgrad.challenges import attacks, corruptions
from fastgrad.challenges.pixels import PixelRange, check_images

#: Strengths of every kind, mild to severe: shares of the unit range, pixels, JPEG quality, grid cells.
CHALLENGES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "noise": (0.04, 0.10, 0.20),
        "blur": (0.7, 1.2, 2.0),
        "contrast": (0.6, 0.35, 0.15),
        "compression": (40, 20, 8),
        "brightness": (0.15, 0.3, 0.45),
        "shuffle": (2, 4, 8),
        "inversion": (1.0,),
        "mixture": (0.25, 0.4, 0.5),
        "phase": (0.3, 0.6, 1.0),
        "magnification": (3, 5, 8),
        "tiling": (2, 4),
        "fgsm": (2 / 255, 4 / 255, 8 / 255),
        "pgd": (2 / 255, 4 / 255, 8 / 255),
        "deepfool": (0.02, 0.5),
        # A smaller overshoot does not outlast the compression.
        "compressed_fgsm": (2 / 255, 4 / 255, 8 / 255),
        "compressed_pgd": (2 / 255, 4 / 255, 8 / 255),
        "compressed_deepfool": (0.5,),
    }
)

#: Kinds that resemble each other: what finds one of a family finds the others.
FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "noise": "grain",
        "compression": "grain",
        "fgsm": "grain",
        "pgd": "grain",
        "deepfool": "grain",
        "compressed_fgsm": "grain",
        "compressed_pgd": "grain",
        "compressed_deepfool": "grain",
        "blur": "blur",
        "contrast": "light",
        "brightness": "light",
        "inversion": "light",
        "shuffle": "layout",
        "mixture": "layout",
        "phase": "texture",
        "magnification": "blur",
        "tiling": "layout",
    }
)

_CORRUPTIONS: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "noise": corruptions.noise,
    "blur": corruptions.blur,
    "contrast": corruptions.contrast,
    "compression": corruptions.compression,
    "brightness": corruptions.brightness,
    "shuffle": corruptions.shuffle,
    "inversion": corruptions.inversion,
    "mixture": corruptions.mixture,
    "phase": corruptions.phase,
    "magnification": corruptions.magnification,
    "tiling": corruptions.tiling,
}
#: JPEG qualities that cameras and sites write; attacks survive them, traces of them in pixels hardly.
_QUALITIES = (60, 95)
_Attack = Callable[..., Tensor]


def _compressed(attack: _Attack) -> _Attack:
    """The attack, and JPEG after it: what is left of it is in the network's answer rather than in pixels."""

    def attacked(
        model: nn.Module, unit: Tensor, strength: float, generator: Generator, *, pixels: PixelRange
    ) -> Tensor:
        made = attack(model, unit, strength, generator, pixels=pixels)
        low, high = _QUALITIES
        quality = int(torch.randint(low, high + 1, (), generator=generator))
        return corruptions.compression(made, quality, generator)

    return attacked


_ATTACKS: dict[str, _Attack] = {"fgsm": attacks.fgsm, "pgd": attacks.pgd, "deepfool": attacks.deepfool}
_THEN_JPEG = {f"compressed_{name}": _compressed(attack) for name, attack in _ATTACKS.items()}
_ATTACKS |= _THEN_JPEG
#: Kinds of attack that went through JPEG.
COMPRESSED = tuple(_THEN_JPEG)


def challenge_names(names: Sequence[str] | None = None, severities: Sequence[int] | None = None) -> list[str]:
    """Full names such as ``"noise-2"`` (kind and severity, 1 is the mildest).

    Args:
        names: kinds (``"noise"``: all its severities) or full names; None for every kind.
        severities: keep only these severities of the kinds named without one; None for all. Kinds with fewer
            severities give the ones they have.

    Raises:
        ValueError: for a name that is neither, naming those that exist.
    """
    wanted = None if severities is None else set(severities)
    if wanted is not None and not wanted <= {1, 2, 3}:
        raise ValueError(f"severities must be among 1, 2 and 3; they were {list(severities or ())!r}")
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of names; it was the string {names!r}")
    full: list[str] = []
    for name in CHALLENGES if names is None else names:
        kind, _, level = name.partition("-")
        checks.one_of("names", kind, CHALLENGES)
        levels = range(1, len(CHALLENGES[kind]) + 1)
        if level:
            checks.one_of("names", name, [f"{kind}-{n}" for n in levels])
            full.append(name)
        else:
            full += [f"{kind}-{n}" for n in levels if wanted is None or n in wanted]
    return full


def iter_challenges(
    model: nn.Module | None,
    images: Tensor,
    *,
    names: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    seed: int = 0,
    clip: tuple[float, float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 128,
    pixels: PixelRange | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, challenging images)`` one by one; arguments as for :func:`generate_challenges`.

    Everything is checked before the first item is made. Only one challenge is held in memory at a time. ``pixels``
    takes the place of ``clip``, ``mean`` and ``std`` where the range is known already.
    """
    full = challenge_names(names, severities)
    check_images(images)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None; it was {type(model).__name__}")
    needing = sorted({name.partition("-")[0] for name in full} & set(_ATTACKS))
    if model is None and needing:
        raise ValueError(f"model must be given for {', '.join(needing)}; it was None")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; it was {batch_size}")
    if pixels is None:
        pixels = PixelRange.of(images, clip=clip, mean=mean, std=std)
    return _generate(model, images, full, pixels, seed, batch_size)


def _generate(
    model: nn.Module | None, images: Tensor, full: list[str], pixels: PixelRange, seed: int, batch_size: int
) -> Iterator[tuple[str, Tensor]]:
    unit = pixels.to_unit(images.detach())
    for name in full:
        kind, _, level = name.partition("-")
        strength = CHALLENGES[kind][int(level) - 1]
        # A seed for every name: what one challenge looks like does not depend on which others are made.
        generator = Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        if not len(unit):
            made = unit
        elif kind in _CORRUPTIONS:
            made = _CORRUPTIONS[kind](unit, strength, generator).clamp(0, 1)
        else:
            assert model is not None  # checked by iter_challenges
            with attacks.evaluating(model):
                parts = [
                    _ATTACKS[kind](model, part, strength, generator, pixels=pixels)
                    for part in torch.split(unit, batch_size)
                ]
            made = torch.cat(parts)
        yield name, pixels.from_unit(made)


def generate_challenges(
    model: nn.Module | None,
    images: Tensor,
    *,
    names: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    seed: int = 0,
    clip: tuple[float, float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 128,
) -> dict[str, Tensor]:
    """Challenging versions of clean images: corruptions, and attacks on the model's own predictions.

    The model is run in evaluation mode and left as it was: modes, gradients, hooks, buffers.

    Args:
        model: classifier ``(B, C, H, W) -> (B, N)`` logits; None where no attack is asked for.
        images: clean images ``(B, C, H, W)``, any floating dtype, any normalisation.
        names: kinds or full names (see :func:`challenge_names`); None for every kind.
        severities: severities of the kinds named without one; None for all.
        seed: same seed, same challenges. Give every batch of a loader a seed of its own.
        clip: values of black and white; derived from the images when not given (see :meth:`PixelRange.of`).
        mean: per-channel mean of the normalisation, where there was one; needs ``std``.
        std: per-channel standard deviation of the normalisation.
        batch_size: images attacked at a time.

    Returns:
        ``{"noise-1": (B, C, H, W), ...}`` in the range, dtype and device of ``images``. Images are clipped to
        the pixel range, and image i of each challenge comes from image i of ``images``.

    Raises:
        TypeError: ``images`` is not floating, or ``model`` is no module.
        ValueError: unknown names, wrong shapes, non-finite images, attacks without a model.
    """
    return dict(
        iter_challenges(
            model,
            images,
            names=names,
            severities=severities,
            seed=seed,
            clip=clip,
            mean=mean,
            std=std,
            batch_size=batch_size,
        )
    )
