"""Read clean inputs and challenges: one forward pass of each, from which come all blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastgrad.batches import bar, batch_size, pieces, to_device
from fastgrad.blocks.extraction import Extraction, Inputs
from fastgrad.blocks.features import Features
from fastgrad.challenges import CHALLENGES, PixelRange, generate_challenges
from fastgrad.challenges.attacks import gradients_reach
from fastgrad.challenges.tokens import generate_token_challenges
from fastgrad.detector.constants import CHALLENGED_TOGETHER
from fastgrad.detector.data import Data
from fastgrad.detector.grey_levels import shifted
from fastgrad.evaluation import device_of

#: Inputs, the kind of each as in `Features`, and the number of the clean input that it is or was made from, or -1.
Batch = tuple[Inputs, Sequence[str], Sequence[int]]


def batches_of(data: Data, model: nn.Module, seed: int, verbose: bool | None) -> Iterable[Batch]:
    """Return clean inputs, the user's challenges, and challenges made from clean inputs, in the order of reading."""
    # Those of token ids are made first, so that what has none is refused before anything is read.
    made = bar(_generated(data, model, seed), "challenges", verbose) if data.each else ()
    return itertools.chain(_given(data, verbose), made)


def _given(data: Data, verbose: bool | None) -> Iterator[Batch]:
    first = 0
    for x in bar([x for drawn in data.drawn for x in drawn.batches], "clean inputs", verbose):
        count = batch_size(x)
        if data.pixels is not None and data.levels is not None:
            x = shifted(x, data.levels[first : first + count].view(-1, 1, 1, 1), data.pixels)
        yield x, [""] * count, range(first, first + count)
        first += count
    if data.challenges is not None:
        tags = iter(data.challenges.tags)
        for x in bar(data.challenges.batches, "challenges", verbose):
            count = batch_size(x)
            kinds = ["challenge" if tag is None else f"kind {tag}" for tag in itertools.islice(tags, count)]
            yield x, kinds, [-1] * count


def _generated(data: Data, model: nn.Module, seed: int) -> Iterable[Batch]:
    """Return challenges made from inputs that are not held out; those of images are made when they are read."""
    clean = data.drawn[0]
    fitting = (~data.held_out[: len(clean.tags)]).nonzero()[:, 0].numpy()
    if data.pixels is not None:
        return _altered(data, model, fitting, data.pixels, seed)
    tokens = list(generate_token_challenges(clean.batches, fitting.tolist(), each=data.each, seed=seed))
    if not tokens:
        raise ValueError(
            "clean must give token ids that can be left out, moved or replaced, for challenges to be generated; all "
            "were padding, alone in their input, or held by every input. Give challenges=None, or a loader of them"
        )
    return [(made.inputs, made.kinds, made.sources.tolist()) for made in tokens]


def _altered(
    data: Data, model: nn.Module, fitting: NDArray[np.int64], pixels: PixelRange, seed: int
) -> Iterator[Batch]:
    """Yield altered images; attacks are among them only if gradients reach the images."""
    device = device_of(model)
    pixels = PixelRange(pixels.low.to(device), pixels.high.to(device))
    rows = [row for x in data.drawn[0].images for row in x.split(1)]
    attacked = gradients_reach(model, rows[0].to(device))
    names = [name for name, kind in CHALLENGES.items() if attacked or not kind.passes]
    first = 0
    for _, group in itertools.groupby(fitting, key=lambda number: rows[number].shape):
        alike = np.array(list(group))
        for numbers in np.split(alike, range(CHALLENGED_TOGETHER, len(alike), CHALLENGED_TOGETHER)):
            x = torch.cat([rows[number] for number in numbers]).to(device)
            for made in generate_challenges(
                model, x, each=data.each, names=names, first=first, seed=seed, pixels=pixels
            ):
                yield made.inputs, made.kinds, numbers[made.sources.cpu().numpy() - first].tolist()
            first += len(numbers)


def read(extraction: Extraction, data: Data, seed: int, verbose: bool | None) -> Features:
    """Return the features of all inputs; ValueError if the network gives no answer or a block is not finite."""
    parts = []
    for x, kinds, numbers in batches_of(data, extraction.model, seed, verbose):
        part = features_of(extraction, x)
        what = "challenges" if kinds[0] else "clean and calibration"
        # A class may be masked out by minus infinity, but not all classes.
        if failed := int((~part.logits.logsumexp(1).isfinite()).sum()):
            made = kinds[0] and numbers[0] >= 0
            hint = ". They were generated: give the clip of the images, a loader of challenges, or None" if made else ""
            raise ValueError(
                f"{what} must give inputs that the network has an answer to; for {failed} it gave NaN or infinity{hint}"
            )
        if infinite := [name for name, value in part.blocks.items() if not value.isfinite().all()]:
            raise ValueError(f"{what} must give inputs whose blocks are finite; {infinite} were not")
        parts.append(Features.of(part.logits, part.blocks, kinds=kinds, **known_of(data, kinds, numbers)))
    return Features.cat(parts)


def known_of(data: Data, kinds: Sequence[str], numbers: Sequence[int]) -> dict[str, Tensor]:
    """Return sources, labels and held-out inputs of a batch, as `Features` has them."""
    place = torch.tensor(numbers, device="cpu")
    clean = torch.tensor([kind == "" for kind in kinds], device="cpu")
    sources, labels = (torch.where(place >= 0, values[place], -1) for values in (data.sources, data.labels))
    return {"sources": sources, "labels": labels, "held_out": data.held_out[place] & clean}


def features_of(extraction: Extraction, x: Inputs) -> Features:
    """Return the features of a batch in float32, read in pieces that a network is fast on."""
    device = device_of(extraction.model)
    found = [extraction(to_device(part, device)) for part in pieces(x, device)]
    blocks = {name: torch.cat([own[name] for _, own in found]).float() for name in found[0][1]}
    return Features.of(torch.cat([logits for logits, _ in found]).float(), blocks)
