"""The photographs of one draw with everything that detectors read of them, kept in the cache.

A detector is fitted on the photographs of the draw's part ``fit``, calibrated on ``calibration`` and on challenges that
`fastgrad.challenges` generates from both; the draw's cases are for the test alone. All is extracted once, for every
budget and every control: what a budget keeps is a choice among these blocks.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.paper import cache, photograph_detectors
from bench.paper.draws import CASES, Draw
from fastgrad import TwoStageModel, UncertaintyDetector
from fastgrad.blocks import Activations, BiasGradients, Block, Contrasts, Features, Image, Logits, View
from fastgrad.blocks.extraction import Extraction
from fastgrad.blocks.subject import Subject, watch
from fastgrad.budget import Candidates, candidates
from fastgrad.challenges import CHALLENGES
from fastgrad.samples import Sources, collect
from fastgrad.scores.temperature import Temperature

Arrays = dict[str, NDArray[Any]]
#: What is extracted. Left out are the norms of gradients: of this network's 157 parameters they cost some twenty
#: forward passes, those of its normalisation layers six.
BLOCKS: tuple[type[Block], ...] = (
    Contrasts,
    Logits,
    Features,
    Image,
    Activations,
    BiasGradients,
    View,
)
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
            "published scores": self.published,
        }
        for what, make in makers.items():
            for name in ("fit", "clean", *CASES):
                start = time.perf_counter()
                make(name)
                taken = time.perf_counter() - start
                print(f"{self.name}, {what} of {name}: {taken:.0f} s", file=sys.stderr, flush=True)

    @cached_property
    def subject(self) -> Subject:
        """What is known of the network."""
        return watch(self.draw.model, (self._images("clean")[:2],), {})

    @cached_property
    def extraction(self) -> Extraction:
        """Every block from one pass."""
        extraction = Extraction(self.draw.model, [kind() for kind in self.kinds], log=True)
        extraction.known = self.subject
        return extraction

    def candidates(self, budget: float) -> Candidates:
        """Those of ``kinds`` that a budget allows, with their prices."""
        x = self._images("clean")[:_BATCH]
        # Without a limit the costliest would be measured too: the blocks are named, and still to be chosen among.
        asked = [kind() for kind in self.kinds] if math.isinf(budget) else None
        found = candidates(self.draw.model, self.subject, x, budget, asked)
        served = [block for block in found.blocks if type(block) in self.kinds]
        return dataclasses.replace(found, blocks=served, fixed=False)

    @cached_property
    def samples(self) -> tuple[dict[str, Tensor], NDArray[np.str_], NDArray[np.bool_]]:
        """Blocks, kinds and who is held out, of clean photographs and generated challenges."""

        def make() -> Arrays:
            parts = [
                list(zip(*(value.split(_BATCH) for value in self.draw.clean(part)), strict=True))
                for part in ("fit", "calibration")
            ]
            fraction = UncertaintyDetector().calibration_fraction
            images = len(parts[0]) * _BATCH
            sources = Sources(
                parts[0], None, parts[1], 5000, images, self.each, fraction, self.draw.number, False
            )
            found = collect(self.extraction, self.draw.model, torch.device("cpu"), sources)
            beside = {"kinds": np.array(found.kinds), "held_out": np.array(found.held_out)}
            return {name: value.numpy() for name, value in found.blocks().items()} | beside

        names = [kind.name for kind in self.kinds]
        other = () if self.kinds == BLOCKS and self.each is None else (names, self.each)
        generated = cache.digest("generated 3", dict(CHALLENGES), *other)[:8]
        kept = dict(cache.arrays(self.folder / f"fit-{generated}.npz", make))
        kinds, held_out = kept.pop("kinds"), kept.pop("held_out")
        return {name: torch.from_numpy(value) for name, value in kept.items()}, kinds, held_out

    def fitted(self, names: Sequence[str]) -> TwoStageModel:
        """What ``TwoStageModel(network, blocks=names).fit`` makes of the samples, without extracting them again.

        Its probabilities have a temperature from the labels of the part ``calibration``.
        """
        X, kinds, held_out = self.samples
        model = TwoStageModel(self.draw.model, blocks=[b for b in self.extraction.blocks if b.name in names])
        assert model.asked is not None
        asked = candidates(
            self.draw.model, self.subject, self._images("clean")[:_BATCH], math.inf, model.asked
        )
        report = asked.choose(model.detector, X, kinds, held_out, own=False)
        model.detector = report.fit(model.detector, X, kinds, held_out)
        model.detector_module = model.detector.to_module()
        model.extraction, model._report = self.extraction.of(model.asked), report
        labels = self.draw.clean("calibration")[1]
        calibration = np.flatnonzero((kinds == "") & held_out)
        model.temperature = Temperature.fit(X["logits"][calibration], labels)
        return model

    def blocks(self, name: str) -> Arrays:
        """Blocks of the test photographs (``"clean"``) or of a case."""

        def make() -> Arrays:
            parts = [self.extraction(x)[1] for x in self._images(name).split(_BATCH)]
            return {block: torch.cat([part[block] for part in parts]).float().numpy() for block in parts[0]}

        return cache.arrays(self.folder / f"{_slug(name)}.npz", make)

    def published(self, name: str) -> Arrays:
        """Scores of the published detectors that need the images, of ``"fit"``, ``"clean"`` or a case."""

        def make() -> Arrays:
            if name == "fit":
                return photograph_detectors.reference(self.draw.model, self._images("fit"))
            count = _CLEAN if name == "clean" else _CASE
            return photograph_detectors.from_images(
                self.draw.model, self.published("fit"), self._images(name)[:count]
            )

        return cache.arrays(self.folder / f"published-{_slug(name)}.npz", make)

    def _images(self, name: str) -> Tensor:
        if name in ("fit", "clean"):
            images = self.draw.clean("fit" if name == "fit" else "test")[0]
        else:
            images = self.draw.case(name).images
        return images.contiguous(memory_format=torch.channels_last)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
