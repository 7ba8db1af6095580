"""The photographs of one draw with everything that detectors read of them, kept in the cache.

A detector is fitted on the photographs of the draw's parts ``fit`` and ``calibration`` and on challenges that
`fastgrad.challenges` generates from them; the draw's cases are for the test alone. All is extracted once, for every
budget and every control (`bench.paper.own`).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from bench.paper import cache, published
from bench.paper.cache import Arrays
from bench.paper.coverage import IMAGENET, Coverage
from bench.paper.data.photographs import stages
from bench.paper.draws import CASES, Draw
from bench.paper.own import BLOCKS, Reading, Samples, batches, extracted, generation, read
from fastgrad import TwoStageModel
from fastgrad.blocks import Block
from fastgrad.detector.budget import candidates
from fastgrad.scores.temperature import Temperature

_BATCH = 16
#: Clean images and images of a case that the published detectors with gradients are tried on: each takes several
#: passes.
_CLEAN, _CASE = 160, 50


class Photographs:
    """One draw and the features of all its images.

    Args:
        draw: Of the photographs.
        kinds: Of blocks that are extracted.
        each: Challenges generated from each image; None for as many as `TwoStageModel.fit` makes.
    """

    def __init__(self, draw: Draw, kinds: Sequence[type[Block]] = BLOCKS, each: int | None = None) -> None:
        self.draw, self.name, self.kinds, self.each = draw, draw.name, tuple(kinds), each
        self.folder = draw.folder / "photographs-blocks" / f"{draw.number + 1}-{draw.weights[:12]}"

    def prepare(self) -> None:
        """Make what the cache lacks; progress goes to standard error."""
        self.draw.prepare()
        makers: dict[str, Callable[[str], object]] = {
            "features": lambda name: self.samples if name == "fit" else self.blocks(name),
            "published scores": lambda name: None if name in ("fit", *self.empty) else self.published(name),
        }
        for what, make in makers.items():
            for name in ("fit", "clean", *CASES):
                start = time.perf_counter()
                make(name)
                taken = time.perf_counter() - start
                print(f"{self.name}, {what} of {name}: {taken:.0f} s", file=sys.stderr, flush=True)

    @cached_property
    def empty(self) -> list[str]:
        """Cases of no image: an attack none of whose images misleads the network any more."""
        return [name for name in CASES if not len(self.draw.case(name).images)]

    @cached_property
    def reading(self) -> Reading:
        """What is read of the network."""
        return Reading(self.draw.model, self._images("clean")[:_BATCH], self.kinds, self.each)

    @cached_property
    def samples(self) -> Samples:
        """Clean photographs and generated challenges."""

        def make() -> Arrays:
            return self.reading.samples(batches(self._known(), _BATCH), self.draw.number)

        return read(cache.arrays(self.folder / f"fit-{generation(self.kinds, self.each)}.npz", make))

    def fitted(self, names: Sequence[str]) -> TwoStageModel:
        """What ``TwoStageModel(network, blocks=names).fit`` makes of the samples, without extracting them again.

        Its probabilities have a temperature from the labels of the same photographs.
        """
        (X, kinds, held_out, groups), reading = self.samples, self.reading
        model = TwoStageModel(reading.model, blocks=[b for b in reading.extraction.blocks if b.name in names])
        assert model.asked is not None
        asked = candidates(reading.model, reading.subject, reading.x, math.inf, model.asked)
        report = asked.choose(model.detector, X, kinds, held_out, own=False)
        model.detector = report.fit(model.detector, X, kinds, groups)
        model.detector_module = model.detector.to_module()
        model.extraction, model._report = reading.extraction.of(model.asked), report
        _, labels = self._known()
        model.temperature = Temperature.fit(X["logits"][torch.from_numpy(kinds == "")], labels)
        return model

    def _known(self) -> tuple[Tensor, Tensor]:
        """The photographs that are no test, and their labels."""
        (fit, fit_labels), (rest, labels) = (self.draw.clean(part) for part in ("fit", "calibration"))
        return torch.cat([fit, rest]), torch.cat([fit_labels, labels])

    def blocks(self, name: str) -> Arrays:
        """Blocks of the test photographs (``"clean"``) or of a case."""
        return cache.arrays(
            self.folder / f"{_slug(name)}-{extracted(self.kinds)}.npz",
            lambda: self.reading.blocks(self._images(name)),
        )

    @cached_property
    def from_images(self) -> dict[str, published.FromImages]:
        """The published detectors that need the images."""
        model = self.draw.model
        movement = cache.arrays(
            self.folder / "published-fit.npz",
            lambda: {"movement": published.movements(model, self._images("fit"), _BATCH)},
        )["movement"]
        return published.from_images(model, torch.from_numpy(movement), _BATCH) | {"NAC": self._nac}

    @cached_property
    def _nac(self) -> published.FromImages:
        nac = Coverage(self.draw.model, stages(self.draw.model), IMAGENET)
        known = self._known()[0].contiguous(memory_format=torch.channels_last)
        counts = cache.arrays(
            self.folder / "NAC-fit.npz",
            lambda: {str(place): count for place, count in enumerate(nac.fit(known, _BATCH))},
        )
        nac.counts = [torch.from_numpy(counts[str(place)]) for place in range(len(counts))]
        return published.in_batches(nac, _BATCH)

    def published(self, name: str) -> Arrays:
        """Their scores of ``"clean"`` or a case."""
        images = self._images(name)[: _CLEAN if name == "clean" else _CASE]
        return {
            method: cache.arrays(
                self.folder / f"{method}-{_slug(name)}.npz", lambda score=score: {"score": score(images)}
            )["score"]
            for method, score in self.from_images.items()
        }

    def _images(self, name: str) -> Tensor:
        if name in ("fit", "clean"):
            images = self.draw.clean("fit" if name == "fit" else "test")[0]
        else:
            images = self.draw.case(name).images
        return images.contiguous(memory_format=torch.channels_last)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
