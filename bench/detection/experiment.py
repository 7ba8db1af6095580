"""A network with its clean images, the cases that it is shown, and what one pass reads from images."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.detection import cache

#: Images at a time.
BATCH = 16
#: Kinds of data: photographs, of which a class has one or two; images of 32 pixels; texts; files.
PHOTOGRAPHS, SMALL, TEXTS, FILES = "photographs", "small images", "texts", "files"
IMAGES = (PHOTOGRAPHS, SMALL)


class NotRun(Exception):  # noqa: N818
    """Why a method or a case has no result for a network."""


class Options(NamedTuple):
    """A command's options: folders of data and cache, small sets, samples of the data or seeds of networks."""

    data: Path
    cache: Path
    quick: bool = False
    draws: int = 1


class Shown(NamedTuple):
    """Images of a case ``(n, C, H, W)`` in [0, 1]; for an attack only those that mislead the network.

    ``source`` ``(n,)`` are the places, in their part, of the clean images they are made from; -1 for other sets.
    """

    images: Tensor
    source: Tensor


@dataclass
class Experiment:
    """A network and its data.

    Attributes:
        network: Key of its row in the tables.
        draw: Which sample of the data, or seed of the training.
        model: From images in [0, 1] to logits; evaluation mode, without gradients.
        parts: ``fit`` and ``test``: clean images and labels.
        options: The command's options.
        kind: Kind of data, which determines the cases.
        count: Images of a case.
        stages: Modules whose maps are read, from the first to the last, whose map is pooled.
        source: Object that makes the cases of texts or files.
    """

    network: str
    draw: int
    model: nn.Module
    parts: Mapping[str, tuple[Tensor, Tensor]]
    options: Options
    kind: str
    count: int
    stages: Sequence[nn.Module] = ()
    source: Any = None
    _seen: dict[tuple[str, str], Seen] = field(default_factory=dict, init=False)

    @cached_property
    def key(self) -> str:
        """Digest of the weights and the data."""
        inputs = (part for part, _ in self.parts.values())
        means = [x.double().flatten(2).mean(-1).numpy() if x.ndim > 2 else x.numpy() for x in inputs]
        return cache.digest(self.model, *means, self.count)

    @property
    def few(self) -> bool:
        """Whether classes have at most a few images in ``fit``: nothing is fitted to a class then."""
        return self.kind in (PHOTOGRAPHS, FILES)

    @cached_property
    def layer(self) -> nn.Linear:
        """The layer that returns the logits."""
        return [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]

    def kept(self, name: str, make: Callable[[], Mapping[str, NDArray[Any]]]) -> cache.Arrays:
        """Return arrays from the cache, or those made now and kept there."""
        slug = re.sub(r"[^A-Za-z0-9/]+", "-", name)
        return cache.arrays(self.options.cache / f"{self.network}-{self.draw}-{self.key}" / f"{slug}.npz", make)

    def seen(self, case: str, part: str = "test") -> Seen:
        """Return a case's images with what a pass reads from them; ``clean`` is the part's own images."""
        return self._seen.setdefault((case, part), Seen(self, case, part))

    @cached_property
    def right(self) -> dict[str, Tensor]:
        """Places of the clean images of each part that the network classifies rightly."""
        return {
            part: (self.seen("clean", part).logits.argmax(1) == labels).nonzero()[:, 0]
            for part, (_, labels) in self.parts.items()
        }


class Case(NamedTuple):
    """A kind of unusual inputs: the group whose mean it enters, and the kinds of data that have it."""

    group: str
    kinds: tuple[str, ...]
    make: Callable[[Experiment, str, int], Shown]


#: Cases by name; `registry.case` adds them.
CASES: dict[str, Case] = {}


@dataclass
class Seen:
    """Images of a case and what a pass reads from them; made once, features kept in the cache."""

    experiment: Experiment
    case: str
    part: str = "test"

    @cached_property
    def shown(self) -> Shown:
        if self.case == "clean":
            images = self.experiment.parts[self.part][0]
            return Shown(images, torch.arange(len(images)))
        # A score may ask for the images under `no_grad`, and an attack needs gradients.
        with torch.enable_grad():
            found = CASES[self.case].make(self.experiment, self.part, self.experiment.count)
        if not len(found.images):
            raise NotRun("no input misleads the network")
        return found

    @property
    def images(self) -> Tensor:
        """Images ``(n, C, H, W)`` in the memory layout that is fastest here."""
        return packed(self.shown.images)

    @cached_property
    def _read(self) -> dict[str, Tensor]:
        name = f"read/{self.case}/{self.part}"
        found = self.experiment.kept(name, lambda: read(self.experiment, self.images))
        return {key: torch.from_numpy(value) for key, value in found.items()}

    @property
    def logits(self) -> Tensor:
        """Logits ``(n, N)``."""
        return self._read["logits"]

    @property
    def h(self) -> Tensor:
        """Input of the last layer ``(n, D)``."""
        return self._read["h"]

    @property
    def spread(self) -> Tensor:
        """Standard deviation of every channel of the map before pooling ``(n, D)``."""
        return self._maps("spread")[0]

    @property
    def stages(self) -> list[Tensor]:
        """Means of every channel after each stage ``(n, C_i)``."""
        return self._maps("stage")

    def _maps(self, kind: str) -> list[Tensor]:
        if not (found := [value for name, value in self._read.items() if name.startswith(kind)]):
            raise NotRun("needs a network with maps")
        return found


def packed(images: Tensor) -> Tensor:
    """Return inputs in the memory layout that is fastest here."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


@torch.no_grad()
def read(experiment: Experiment, images: Tensor) -> dict[str, NDArray[np.float32]]:
    """Return logits, h, spread and the stages' means from one pass."""
    parts: dict[str, list[Tensor]] = defaultdict(list)

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module is experiment.layer:
            parts["h"].append(args[0])
            parts["logits"].append(output)
        else:
            # Positions of maps, or of tokens, which have their channels last.
            positions = (2, 3) if output.ndim == 4 else 1
            parts[f"stage{experiment.stages.index(module)}"].append(output.mean(positions))
            if module is experiment.stages[-1]:
                parts["spread"].append(output.std(positions, correction=0))

    with ExitStack() as stack:
        for module in (*experiment.stages, experiment.layer):
            stack.enter_context(module.register_forward_hook(keep))
        for x in images.split(BATCH):
            experiment.model(x)
    return {name: torch.cat(values).float().numpy() for name, values in parts.items()}


@dataclass(frozen=True)
class Fit:
    """The data that a method is fitted on; ``case`` names labelled challenges, empty for none."""

    experiment: Experiment
    case: str = ""

    @property
    def layer(self) -> nn.Linear:
        return self.experiment.layer

    @property
    def clean(self) -> Seen:
        return self.experiment.seen("clean", "fit")

    @property
    def labels(self) -> Tensor:
        """Classes of the clean images, for methods fitted to every class."""
        if self.experiment.few:
            raise NotRun("needs several images of every class")
        return self.experiment.parts["fit"][1]

    @property
    def challenges(self) -> Seen:
        """Labelled challenges, made from the clean images."""
        return self.experiment.seen(self.case, "fit")

    def loader(self, images: Tensor, labels: Tensor | None = None) -> list[tuple[Tensor, ...]]:
        """Return images in batches, as a loader yields them."""
        parts = packed(images).split(BATCH)
        return [(x,) for x in parts] if labels is None else list(zip(parts, labels.split(BATCH), strict=True))
