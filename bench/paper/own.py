"""This package's detectors as the tables compare them: everything is extracted once, for every budget and control.

    reading = Reading(model, images[:32])
    samples = reading.samples([(x, y), ...], seed=0)            # clean batches and challenges generated from them
    found = own(reading, samples)                               # by name: what is kept and why, the detector
    scores(found["fastgrad, budget 1.2"][1], reading.blocks(images))

What a budget keeps is chosen on generated challenges alone, as `TwoStageModel.fit` does it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.paper import cache
from bench.paper.cache import Arrays
from fastgrad import UncertaintyDetector
from fastgrad.blocks import BLOCKS as EVERY
from fastgrad.blocks import BiasGradients, Block, Gradients, Ranked
from fastgrad.blocks.extraction import Extraction
from fastgrad.blocks.subject import Subject, watch
from fastgrad.challenges import CHALLENGES
from fastgrad.detector.budget import Candidates, Report, candidates
from fastgrad.detector.samples import Sources, collect, expected
from fastgrad.detector.worth import USUAL

#: What is extracted. Left out are the norms of gradients of parameters, which cost six forward passes and more.
BLOCKS: tuple[type[Block], ...] = tuple(kind for kind in EVERY.values() if kind not in (Gradients, Ranked))
GRADIENTS = ("contrasts", "bias_gradients")
BUDGETS = (1.2, 2.5, math.inf)


def named(budget: float) -> str:
    """What the tables call a budget."""
    return f"fastgrad, budget {budget:g}" if math.isfinite(budget) else "fastgrad, unlimited"


DEFAULT, UNLIMITED = named(BUDGETS[0]), named(BUDGETS[-1])
#: Controls, and a set that measured worth does not always buy: the budget they start from, the blocks that are left
#: out, or those that alone are left in.
CONTROLS: Mapping[str, tuple[float, tuple[str, ...], tuple[str, ...]]] = {
    "unlimited, no gradients (control)": (math.inf, GRADIENTS, ()),
    "budget 1.2, no activations (control)": (1.2, ("activations",), ()),
    "budget 1.2, no image statistics (control)": (1.2, ("image",), ()),
    "budget 1.2, no roughness (control)": (1.2, ("roughness",), ()),
    "budget 1.2, neither of the two (control)": (1.2, ("image", "roughness"), ()),
    "budget 2.5, no roughness (control)": (2.5, ("roughness",), ()),
    "logits and h alone (control)": (1.2, (), ("logits", "features")),
    "activations alone (control)": (1.2, (), ("activations",)),
    "image statistics alone (control)": (1.2, (), ("image",)),
    "roughness alone (control)": (1.2, (), ("roughness",)),
    "usual blocks and roughness, asked for": (1.2, (), (*USUAL, "roughness")),
}
NAMES = (*map(named, BUDGETS), *CONTROLS)


class Samples(NamedTuple):
    """Of clean images and challenges: blocks, kinds (empty for clean images), who is held out while blocks are chosen,
    and the number of the clean image that each is or was made from.
    """

    blocks: dict[str, Tensor]
    kinds: NDArray[np.str_]
    held_out: NDArray[np.bool_]
    groups: NDArray[np.intp]

    @property
    def clean(self) -> Samples:
        """The clean images alone."""
        places = np.flatnonzero(self.kinds == "")
        blocks = {name: values[torch.from_numpy(places)] for name, values in self.blocks.items()}
        return Samples(blocks, self.kinds[places], self.held_out[places], self.groups[places])

    def beside(self, blocks: Mapping[str, NDArray[Any]], kind: str) -> Samples:
        """With further samples of one kind, none held out."""
        count = len(next(iter(blocks.values())))
        joined = {
            name: torch.cat([values, torch.as_tensor(blocks[name])]) for name, values in self.blocks.items()
        }
        kinds = np.concatenate([self.kinds, np.full(count, kind)])
        held_out = np.concatenate([self.held_out, np.zeros(count, bool)])
        return Samples(joined, kinds, held_out, np.concatenate([self.groups, np.full(count, -1)]))


class Reading:
    """All that this package's detectors read of a network, from one extraction.

    Args:
        model: The network, in evaluation mode.
        x: A batch of its inputs; prices are measured on it.
        kinds: Of blocks that are extracted.
        each: Challenges generated from each image; None for as many as `TwoStageModel.fit` makes.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, kinds: Sequence[type[Block]] = BLOCKS, each: int | None = None
    ) -> None:
        self.model, self.x, self.kinds, self.each = model, x, tuple(kinds), each
        self._candidates: dict[float, Candidates] = {}

    @cached_property
    def subject(self) -> Subject:
        """What is known of the network."""
        return watch(self.model, (self.x[:2],), {})

    @cached_property
    def extraction(self) -> Extraction:
        """Every block from one pass."""
        extraction = Extraction(self.model, [kind() for kind in self.kinds], log=True)
        extraction.known = self.subject
        return extraction

    def blocks(self, images: Tensor, extraction: Extraction | None = None) -> Arrays:
        """Every block of images, or those of another extraction, in float32; batches stay in the processor's cache."""
        parts = [(extraction or self.extraction)(x)[1] for x in images.split(len(self.x))]
        return {name: torch.cat([part[name] for part in parts]).float().numpy() for name in parts[0]}

    def samples(self, batches: list[tuple[Tensor, ...]], seed: int) -> Arrays:
        """What `TwoStageModel.fit` collects from batches, as arrays that can be kept: `read` turns them back."""
        images = expected(batches, len(batches[0][0]))
        sources = Sources(batches, None, None, 5000, images, self.each, seed, False)
        found = collect(self.extraction, self.model, torch.device("cpu"), sources)
        beside = {name: np.array(getattr(found, name)) for name in Samples._fields[1:]}
        return {name: value.numpy() for name, value in found.blocks().items()} | beside

    def candidates(self, budget: float) -> Candidates:
        """Those of ``kinds`` that a budget allows, with their prices."""
        if budget not in self._candidates:
            # Without a limit the costliest would be measured too: the blocks are named, and still to be chosen among.
            asked = [kind() for kind in self.kinds] if math.isinf(budget) else None
            found = candidates(self.model, self.subject, self.x, budget, asked)
            served = [block for block in found.blocks if type(block) in self.kinds]
            self._candidates[budget] = dataclasses.replace(found, blocks=served, fixed=False)
        return self._candidates[budget]

    def fit(
        self, chosen: Candidates, samples: Samples, *, labelled: bool = False
    ) -> tuple[Report, UncertaintyDetector]:
        """What is kept of the candidates, and the detector on it; ``labelled`` challenges are the user's own."""
        base = UncertaintyDetector(log=False)
        blocks = {block.name: self._cut(block, samples.blocks[block.name]) for block in chosen.blocks}
        report = chosen.choose(base, blocks, samples.kinds, samples.held_out, own=labelled)
        return report, report.fit(base, blocks, samples.kinds, samples.groups)

    def live(self, report: Report, detector: UncertaintyDetector) -> Callable[[], object]:
        """The batch ``x`` from pixels to scores, for the price: what is kept is extracted alone."""
        kept = [block for block in self.candidates(report.budget).blocks if block.name in detector.shapes_]
        extraction, module = self.extraction.of(kept), detector.to_module()

        def call() -> None:
            with torch.no_grad():
                module(extraction(self.x)[1])

        return call

    def _cut(self, block: Block, values: Tensor) -> Tensor:
        """What a backward pass that ends early gives: the last places of the whole one's."""
        if not isinstance(block, BiasGradients):
            return values
        return values[:, -sum(place.count for place in block.places(self.subject)) :]


def extracted(kinds: Sequence[type[Block]] = BLOCKS) -> str:
    """A digest of what is read of images, for the names of files; its number rises when what a block reads changes."""
    return cache.digest("extracted 1", [kind.name for kind in kinds])[:8]


def generation(kinds: Sequence[type[Block]] = BLOCKS, each: int | None = None) -> str:
    """The same of generated samples; its number rises when `collect` changes."""
    return cache.digest(
        "generated 6", {name: kind.strengths for name, kind in CHALLENGES.items()}, extracted(kinds), each
    )[:8]


def read(kept: Mapping[str, NDArray[Any]]) -> Samples:
    """Samples from the arrays of `Reading.samples`."""
    blocks = dict(kept)
    beside = {name: blocks.pop(name) for name in Samples._fields[1:]}
    return Samples({name: torch.from_numpy(value) for name, value in blocks.items()}, **beside)


def own(reading: Reading, samples: Samples) -> dict[str, tuple[Report, UncertaintyDetector]]:
    """This package's detectors by the names of `NAMES`: three budgets, and the controls."""
    sets = {named(budget): reading.candidates(budget) for budget in BUDGETS}
    for name, (budget, less, only) in CONTROLS.items():
        chosen = reading.candidates(budget)
        others = [block.name for block in chosen.blocks if only and block.name not in only]
        sets[name] = dataclasses.replace(_less(chosen, [*less, *others]), fixed=bool(only))
    return {name: reading.fit(chosen, samples) for name, chosen in sets.items()}


def _less(chosen: Candidates, names: Sequence[str]) -> Candidates:
    blocks = [block for block in chosen.blocks if block.name not in names]
    entries = tuple(entry for entry in chosen.entries if entry.block not in names)
    return dataclasses.replace(chosen, blocks=blocks, entries=entries)


def worths(report: Report) -> str:
    """What each block was worth, in a line."""
    measured = (entry for entry in report.entries if entry.worth is not None)
    return "; ".join(f"{entry.block} {entry.worth:+.3f} ± {entry.interval:.3f}" for entry in measured)


def visible(detector: UncertaintyDetector, blocks: Mapping[str, NDArray[Any]]) -> Arrays:
    """What a detector reads of the blocks: of signed gradients those of its own, shorter, backward pass."""
    return {name: blocks[name][..., -shape[-1] :] for name, shape in detector.shapes_.items()}


def scores(detector: UncertaintyDetector, blocks: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """``decision_function``; higher is less reliable."""
    found: NDArray[np.float64] = detector.decision_function(visible(detector, blocks))
    return found


def batches(images: Iterable[Tensor], size: int) -> list[tuple[Tensor, ...]]:
    """Images, and what belongs to them, in batches as a loader gives them."""
    return list(zip(*(value.split(size) for value in images), strict=True))
