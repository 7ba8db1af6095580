"""The data of a fit: clean inputs and challenges, checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from fastgrad import checks
from fastgrad.challenges import PixelRange
from fastgrad.challenges.tokens import ids_of
from fastgrad.detector import constants, loaders
from fastgrad.detector.grey_levels import shifts
from fastgrad.detector.inputs import held_out_of
from fastgrad.detector.loaders import Drawn, Given


@dataclass(frozen=True)
class Data:
    """Clean inputs, n in all, and challenges."""

    drawn: list[Drawn]  # clean inputs, and those that only calibrate if they have a loader of their own
    challenges: Drawn | None  # the user's
    labels: Tensor  # (n,), -1 for none
    sources: Tensor  # (n,): equal inputs have the same number
    held_out: Tensor  # (n,), bool: those that only calibrate
    each: int  # challenges to generate from each input that is not held out; 0 for none
    pixels: PixelRange | None  # of images
    normalisation: list[list[float]] | None  # mean and standard deviation by channel, if the user gave them
    levels: Tensor | None  # (n,): by how many grey levels each image is shifted; None if inputs are not images
    seen: int  # clean inputs that the loaders gave


def draw(
    clean: Given, y: Any, challenges: str | Given | None, calibration: Given | None, *,
    max_samples: int, challenges_per_input: int | None, dtype: torch.dtype, seed: int, verbose: bool | None,
) -> tuple[list[Drawn], Drawn | None]:  # fmt: skip
    """Read all loaders once and return `Data.drawn` and `Data.challenges`."""
    least = constants.FEWEST_CLEAN
    checks.at_least(least, max_samples=max_samples)
    if isinstance(challenges, str) and challenges != "generate":
        raise ValueError(f"challenges must be 'generate', None or a loader; it was {challenges!r}")
    if challenges_per_input is not None:
        checks.at_least(1, challenges_per_input=challenges_per_input)
        if not isinstance(challenges, str):
            raise ValueError(
                f"challenges_per_input needs challenges='generate'; it was {challenges_per_input} beside others or none"
            )

    def drawn(name: str, given: Given, shift: int, y: Any = None) -> Drawn:
        batches = loaders.batches_of(name, given, dtype, y)
        return loaders.draw(name, batches, max_samples, seed + shift, verbose=verbose)

    every = [drawn("clean", clean, 0, y)]
    if (count := len(every[0].tags)) < least:
        raise ValueError(
            f"clean must give at least {least} inputs, with which a false-alarm rate of {1 / (least + 1):.2f} is "
            f"possible; it gave {count}"
        )
    if calibration is not None:
        every.append(drawn("calibration", calibration, 1))
        if (count := len(every[1].tags)) < least:
            raise ValueError(f"calibration must give at least {least} inputs; it gave {count}")
    given = challenges is not None and not isinstance(challenges, str)
    return every, drawn("challenges", challenges, 2) if given else None  # type: ignore[arg-type]


def check(
    drawn: list[Drawn], given: Drawn | None, classes: int, *, generate: bool, each: int | None,
    fraction: float | None, random_state: Any, seed: int, clip: tuple[float, float] | None,
    mean: Sequence[float] | None, std: Sequence[float] | None,
) -> Data:  # fmt: skip
    """Check what was drawn, and decide what is held out, challenged and shifted."""
    clean, *others = drawn
    names = ("clean", "calibration")
    labels = torch.cat([loaders.labels_of(name, one, classes) for name, one in zip(names, drawn, strict=False)])
    count = len(clean.tags)
    first: dict[int, int] = {}
    sources = np.array([first.setdefault(hashed, len(first)) for one in drawn for hashed in one.hashes])
    if others:
        held_out = np.arange(len(sources)) >= count
    else:
        held_out = held_out_of(None, np.zeros(count, bool), sources, fraction, check_random_state(random_state))
    pixels = _pixels(drawn, clip, mean, std, generate=generate)
    if generate:
        _require_kind(clean)
        each = each or min(constants.EACH, max(1, constants.MOST_CHALLENGES // int((~held_out).sum())))
    different, least = len(np.setdiff1d(sources[:count], sources[count:])), constants.FEWEST_CLEAN
    if different < least:
        suffix = " that calibration does not give" if others else ""
        raise ValueError(f"clean must give at least {least} different inputs{suffix}; it gave {different}")
    places = torch.from_numpy(sources)
    return Data(
        drawn, given, labels, places, torch.from_numpy(held_out), each or 0, pixels,
        _normalisation(clean.images[0].shape[1], clip, mean, std) if clean.images else None,
        None if pixels is None else shifts(len(first), seed)[places],
        sum(one.seen for one in drawn),
    )  # fmt: skip


def require_labels(labels: Tensor, *, risk: bool | None, correct: object, generate: bool) -> None:
    """Raise ValueError if there are too few labels for what is asked for."""
    labelled = int((labels >= 0).sum())
    if correct and (labels[0] < 0 or not generate):
        raise ValueError(
            "correct=True needs challenges='generate' and clean (x, labels), from whose challenges it learns; there "
            f"were {'no labels' if labels[0] < 0 else 'other challenges or none'}"
        )
    if (risk or correct) and labelled < constants.FEWEST_LABELLED:
        what = "risk=True" if risk else "correct=True"
        raise ValueError(f"{what} needs at least {constants.FEWEST_LABELLED} inputs with labels; there were {labelled}")


def _normalisation(
    channels: int, clip: tuple[float, float] | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[list[float]] | None:
    """Return the mean and standard deviation that normalised unit images."""
    if clip is None and mean is None:
        return None
    black, white = (0.0, 1.0) if clip is None else clip
    shift, scale = ([value] * channels if own is None else own for value, own in ((0.0, mean), (1.0, std)))
    return [[float((m - black) / (white - black)) for m in shift], [float(s / (white - black)) for s in scale]]


def _pixels(
    drawn: list[Drawn], clip: tuple[float, float] | None, mean: Sequence[float] | None, std: Sequence[float] | None, *,
    generate: bool,
) -> PixelRange | None:  # fmt: skip
    """Return black and white of the images, or None if the inputs are not images."""
    declared = any(value is not None for value in (clip, mean, std))
    images = drawn[0].images
    if not images:
        if declared:
            raise ValueError("clip, mean and std need images (B, C, H, W); clean gave other inputs")
        return None
    if not all(bool(x.isfinite().all()) for x in images):
        raise ValueError("clean must give finite images; some held NaN or infinity")
    if all(bool((x.amax((2, 3)) == x.amin((2, 3))).all()) for x in images):
        raise ValueError("clean must give images that show something; every one was constant")
    # A range is not read from images of the calibration loader.
    ranged = [x for one in (drawn if declared else drawn[:1]) for x in one.images]
    pixels = PixelRange.of(ranged, clip=clip, mean=mean, std=std)
    if generate:
        ends = [float(end) for x in ranged for end in pixels.to_unit(x).aminmax()]
        if (spread := max(ends) - min(ends)) < constants.LEAST_SPREAD:
            black, white = float(pixels.low.min()), float(pixels.high.max())
            raise ValueError(
                f"images must spread over the range from black to white, here [{black:.4g}, {white:.4g}]; they took "
                f"{spread:.2g} of it: give the clip=(black, white), mean and std of these images"
            )
    return pixels


def _require_kind(clean: Drawn) -> None:
    """Raise ValueError if challenges cannot be generated from inputs of this kind."""
    images = clean.images
    if not images and any(ids_of(x) is None for x in clean.batches):
        raise ValueError(
            "challenges can be generated from images (B, C, H, W) or token ids (B, T) only; give challenges=None "
            "to fit on clean data alone, or a loader of challenges. Images are tensors of a floating dtype, in no "
            "mapping; token ids have an integer dtype, and are tensors or the input_ids of mappings"
        )
    last = next((tuple(x.shape) for x in images if x.shape[3] in (1, 3, 4) and min(x.shape[1:3]) >= 8), None)
    if last is not None:
        raise ValueError(
            f"challenges can be generated from images (B, C, H, W) only; these had their channels last, {last}. "
            "Move them to dimension 1 (x.movedim(-1, 1)), and back in a module around the network"
        )
