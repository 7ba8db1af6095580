"""The loaders given to `TwoStageModel.fit`: drawn once, and checked before anything is fitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from fastgrad import checks
from fastgrad.batches import batch_size, take
from fastgrad.challenges import PixelRange
from fastgrad.challenges.tokens import ids_of
from fastgrad.detector import collect, constants
from fastgrad.detector.collect import Drawn, Sample
from fastgrad.detector.estimator import UncertaintyDetector
from fastgrad.detector.grey_levels import shifts
from fastgrad.detector.inputs import held_out_of

#: Batches of a loader, or all inputs: a tensor, an array, or a mapping of tensors.
Data = Iterable[Any]
#: How many inputs go together if all are given at once.
TOGETHER = 64


@dataclass(frozen=True)
class FitOptions:
    """Arguments of `TwoStageModel.fit`, and two of the model, of the same names."""

    clean: Data
    y: Any
    challenges: str | Data | None
    calibration: Data | None
    max_samples: int
    challenges_per_input: int | None
    risk: bool | None
    correct: bool | Literal["always"]
    clip: tuple[float, float] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    verbose: bool | None
    seed: int

    def normalisation(self, channels: int) -> list[list[float]] | None:
        """Return, from ``clip``, ``mean`` and ``std``, the mean and standard deviation that normalised unit images."""
        if self.clip is None and self.mean is None:
            return None
        black, white = (0.0, 1.0) if self.clip is None else self.clip
        mean, std = ([value] * channels if own is None else own for value, own in ((0.0, self.mean), (1.0, self.std)))
        return [[float((m - black) / (white - black)) for m in mean], [float(s / (white - black)) for s in std]]


def batches_of(name: str, data: Data, dtype: torch.dtype, y: Any = None) -> Data:
    """Return batches of inputs that were given all at once, with their labels ``y``, or the loader that was given.

    Floating arrays get the network's ``dtype``.
    """
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "fiub":
            raise TypeError(f"{name} must be an array of numbers; it was of {data.dtype}")
        data = torch.from_numpy(data)
        data = data.to(dtype) if data.is_floating_point() else data
    if not isinstance(data, (Tensor, Mapping)):
        if y is not None:
            raise TypeError(
                "y must be None beside a loader, whose batches are (x, labels), and challenges are named, "
                f"challenges=...; it was {type(y).__name__}"
            )
        checks.is_loader(name, data)
        return data
    count = batch_size(data)
    labels = None if y is None else np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    if labels is not None and (labels.ndim == 0 or len(labels) != count):
        raise ValueError(f"y must have one label for each of {count} inputs; its shape was {labels.shape}")
    parts = [slice(start, start + TOGETHER) for start in range(0, count, TOGETHER)]
    return [(take(data, part, count), None if labels is None else labels[part]) for part in parts]


def draw_all(options: FitOptions, fraction: float | None, dtype: torch.dtype) -> tuple[list[Drawn], Drawn | None]:
    """Read all loaders once and return `Sample.clean` and `Sample.challenges`."""
    checks.at_least(constants.FEWEST_CLEAN, max_samples=options.max_samples)
    challenges, each = options.challenges, options.challenges_per_input
    if isinstance(challenges, str) and challenges != "generate":
        raise ValueError(f"challenges must be 'generate', None or a loader; it was {challenges!r}")
    if each is not None:
        checks.at_least(1, challenges_per_input=each)
        if not isinstance(challenges, str):
            raise ValueError(f"challenges_per_input needs challenges='generate'; it was {each} beside others or none")

    def draw(name: str, data: Data, shift: int, y: Any = None) -> Drawn:
        return collect.draw(
            name, batches_of(name, data, dtype, y), options.max_samples, options.seed + shift, verbose=options.verbose
        )

    least = constants.FEWEST_CLEAN
    clean = [draw("clean", options.clean, 0, options.y)]
    if len(clean[0]) < least:
        raise ValueError(
            f"clean must give at least {least} inputs, with which a false-alarm rate of {1 / (least + 1):.2f} is "
            f"possible; it gave {len(clean[0])}"
        )
    if options.calibration is not None:
        if fraction is not None:
            raise ValueError(f"calibration must be None where the detector's calibration_fraction is given, {fraction}")
        clean.append(draw("calibration", options.calibration, 1))
        if len(clean[1]) < least:
            raise ValueError(f"calibration must give at least {least} inputs; it gave {len(clean[1])}")
    given = None if challenges is None or isinstance(challenges, str) else draw("challenges", challenges, 2)
    return clean, given


def build_sample(
    drawn: list[Drawn], given: Drawn | None, classes: int, detector: UncertaintyDetector, options: FitOptions
) -> Sample:
    """Check what was drawn, and decide what is held out and challenged."""
    clean, *others = drawn
    count = len(clean)
    labels = collect.labels_of("clean", clean, classes)
    if options.correct and (labels[0] < 0 or not isinstance(options.challenges, str)):
        raise ValueError(
            "correct=True needs challenges='generate' and clean (x, labels), from whose challenges it learns; there "
            f"were {'no labels' if labels[0] < 0 else 'other challenges or none'}"
        )
    first: dict[int, int] = {}
    sources = np.array([first.setdefault(key, len(first)) for one in drawn for key in one.keys])
    if others:
        labels = np.concatenate([labels, collect.labels_of("calibration", others[0], classes)])
        held_out = np.arange(len(labels)) >= count
    else:
        random = check_random_state(detector.random_state)
        held_out = held_out_of(None, np.zeros(count, bool), sources, detector.calibration_fraction, random)
    labelled = int((labels >= 0).sum())
    if (options.risk or options.correct) and labelled < constants.FEWEST_LABELLED:
        what = "risk=True" if options.risk else "correct=True"
        raise ValueError(f"{what} needs at least {constants.FEWEST_LABELLED} inputs with labels; there were {labelled}")
    images = clean.images()
    pixels = _pixels(drawn, options)
    each = 0
    if isinstance(options.challenges, str):
        _require_kind(clean, images)
        most = max(1, constants.MOST_CHALLENGES // int((~held_out).sum()))
        each = options.challenges_per_input or min(constants.EACH, most)
    different, least = len(np.setdiff1d(sources[:count], sources[count:])), constants.FEWEST_CLEAN
    if different < least:
        suffix = " that calibration does not give" if others else ""
        raise ValueError(f"clean must give at least {least} different inputs{suffix}; it gave {different}")
    normalisation = options.normalisation(images[0].shape[1]) if images else None
    levels = None if pixels is None else shifts(len(first), options.seed)[torch.from_numpy(sources)]
    return Sample(drawn, given, labels, sources, held_out, each, pixels, normalisation, levels)


def _pixels(drawn: list[Drawn], options: FitOptions) -> PixelRange | None:
    """Return black and white of the images, or None if the inputs are not images."""
    declared = any(value is not None for value in (options.clip, options.mean, options.std))
    images = drawn[0].images()
    if not images:
        if declared:
            raise ValueError("clip, mean and std need images (B, C, H, W); clean gave other inputs")
        return None
    if not all(bool(x.isfinite().all()) for x in images):
        raise ValueError("clean must give finite images; some held NaN or infinity")
    if all(bool((x.amax((2, 3)) == x.amin((2, 3))).all()) for x in images):
        raise ValueError("clean must give images that show something; every one was constant")
    # A range is not read from images of the calibration loader.
    ranged = [x for one in (drawn if declared else drawn[:1]) for x in one.images()]
    pixels = PixelRange.of(ranged, clip=options.clip, mean=options.mean, std=options.std)
    if isinstance(options.challenges, str):
        ends = [float(end) for x in ranged for end in pixels.to_unit(x).aminmax()]
        if (spread := max(ends) - min(ends)) < constants.LEAST_SPREAD:
            black, white = float(pixels.low.min()), float(pixels.high.max())
            raise ValueError(
                f"images must spread over the range from black to white, here [{black:.4g}, {white:.4g}]; they took "
                f"{spread:.2g} of it: give the clip=(black, white), mean and std of these images"
            )
    return pixels


def _require_kind(clean: Drawn, images: list[Tensor]) -> None:
    """Raise ValueError if challenges cannot be generated from inputs of this kind."""
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
