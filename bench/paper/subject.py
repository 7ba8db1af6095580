"""One trained network with the images of every case and their features, kept on disk once made."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.paper import cache
from bench.paper.data import sets
from bench.paper.data.attacks import attack
from bench.paper.data.corruptions import corrupt
from bench.paper.networks import Classifier
from bench.paper.table import Options
from bench.paper.train import HELD_OUT, Recipe, trained
from fastgrad.blocks import Features, Gradients, Image, Logits
from fastgrad.blocks.extraction import Extraction
from fastgrad.challenges import challenge_names, generate_challenges

#: Kinds of generated challenge that one clean image gives, as in `TwoStageModel.fit`.
PER_IMAGE = 2
#: Searches, steps, step size and first constant of C&W in full mode; the default is shorter.
THOROUGH = (5, 100, 0.05, 0.1)
Arrays = dict[str, NDArray[np.float32]]


def extract(extraction: Extraction, images: Tensor, chunk: int = 32) -> Arrays:
    """The blocks that the default detector takes, in float32. Small chunks stay in the processor's cache."""
    parts = [extraction(part)[1] for part in torch.split(images, chunk)]
    return {name: torch.cat([part[name] for part in parts]).float().numpy() for name in parts[0]}


class Subject:
    """A network and everything measured on it.

    A case is a path: ``clean``, ``attack/FGSM``, ``compressed/FGSM``, ``ood/svhn``, ``corruption/fog/3``,
    ``generated`` or ``control/grey``. Its ``part`` says from which clean images it is made: ``"test"`` (test
    images, for numbers that are reported) or ``"fit"`` (held-out training images, for detectors that train).
    """

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe, self.options = recipe, options
        self._clean: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def name(self) -> str:
        """The file of its weights."""
        return self.recipe.file()

    def prepare(self) -> Classifier:
        """Train the network if the cache lacks it."""
        return self.model

    @cached_property
    def folder(self) -> Path:
        """Where images and features are kept; features of other weights have another folder."""
        name = f"{Path(self.recipe.file()).stem}-{cache.digest(self.model)}"
        return self.options.cache / "features" / name

    @cached_property
    def model(self) -> Classifier:
        """The trained network, in evaluation mode."""
        return trained(self.recipe, self.options.data, self.options.cache)

    @cached_property
    def test(self) -> sets.Split:
        """Test images."""
        return sets.load(self.options.data, self.recipe.dataset, "test", self.options.test)

    def clean(self, part: str) -> tuple[Tensor, Tensor]:
        """Clean images and labels of a part; ``"seen"`` gives images that the network was trained on."""
        if part not in self._clean:
            where = {"fit": (self.options.fit, -HELD_OUT), "seen": (4000, 0)}.get(part)
            split = sets.load(self.options.data, self.recipe.dataset, "train", *where) if where else self.test
            self._clean[part] = split.labelled()
        return self._clean[part]

    def correct(self, part: str) -> NDArray[np.bool_]:
        """Which clean images of a part the network classifies rightly, from the cached logits."""
        labels = self.clean(part)[1].numpy()
        right: NDArray[np.bool_] = self.blocks("clean", part)["logits"].argmax(1) == labels
        return right

    def images(self, case: str, part: str = "test") -> Tensor:
        """The images of a case, made anew; attacks are read from the cache."""
        kind, _, name = case.partition("/")
        seed = zlib.crc32(f"{self.recipe.seed}/{case}/{part}".encode()) % 2**31
        options = self.options
        if kind == "clean":
            return self.clean(part)[0]
        if kind == "ood":
            # The second half of a set for training, the first for testing.
            both = sets.stranger(options.data, name, self.test, 2 * options.case)
            return both[: options.case] if part == "test" else both[options.case :]
        images, labels = self.clean(part)
        if kind == "compressed":
            return sets.to_tensor(sets.jpeg(sets.to_bytes(self.images(f"attack/{name}", part))))
        if kind == "control":
            return sets.to_tensor(sets.grey(sets.to_bytes(images[: options.case])))
        if kind == "corruption":
            corruption, _, severity = name.partition("/")
            count = options.cell if part == "test" else options.case
            return corrupt(images[:count], corruption, int(severity), seed=seed)
        if kind == "generated":
            return self._generated()
        count = options.case if part == "test" else options.learn
        right = torch.from_numpy(self.correct(part)).nonzero()[:count, 0]

        def make() -> Arrays:
            how = {} if options.quick else {"carlini": THOROUGH}
            return {
                "images": attack(self.model, images[right], labels[right], name, seed=seed, **how).numpy()
            }

        return torch.from_numpy(self.kept(case, part, make)["images"])

    def blocks(self, case: str, part: str = "test") -> Arrays:
        """Features of a case's images: the blocks of `Extraction`, logarithms of squared norms."""
        return self.kept(f"blocks/{case}", part, lambda: extract(self.extraction, self.images(case, part)))

    @cached_property
    def extraction(self) -> Extraction:
        """What turns images into blocks, as in `TwoStageModel`; planned once."""
        return Extraction(self.model, [Gradients(), Logits(), Features(), Image()])

    @cached_property
    def held_out(self) -> NDArray[np.bool_]:
        """Which clean images of the part ``"fit"`` calibrate; no challenge is made from them."""
        return np.random.default_rng(self.recipe.seed).random(len(self.clean("fit")[0])) < 0.4

    def generated_kinds(self) -> list[tuple[str, NDArray[np.int64]]]:
        """Names of the generated challenges in turn, and the clean images that each is made from."""
        names, free = challenge_names(), np.flatnonzero(~self.held_out)
        groups = [free[i : i + 32] for i in range(0, len(free), 32)]
        pairs = [(i * PER_IMAGE + k, group) for i, group in enumerate(groups) for k in range(PER_IMAGE)]
        return [(names[turn % len(names)], group) for turn, group in pairs]

    def _generated(self) -> Tensor:
        images, parts = self.clean("fit")[0], []
        for turn, (name, group) in enumerate(self.generated_kinds()):
            chosen = images[torch.from_numpy(group)]
            parts.append(generate_challenges(self.model, chosen, names=[name], seed=turn, clip=(0, 1))[name])
        return torch.cat(parts)

    def kept(self, case: str, part: str, make: Callable[[], Arrays]) -> Arrays:
        """Arrays made for a case, from the cache or made now; the sizes are part of the file's name."""
        options = self.options
        sizes = f"{options.fit}-{options.test}-{options.case}-{options.cell}"
        if "attack/" in case and part == "fit":
            sizes += f"-{options.learn}"
        return cache.arrays(self.folder / f"{case.replace('/', '_')}-{part}-{sizes}.npz", make)


def both_networks(options: Options) -> list[Subject]:
    """A residual and a densely connected network for each seed."""
    return _subjects(options, ("resnet", "densenet"))


def residual_networks(options: Options) -> list[Subject]:
    """A residual network for each seed."""
    return _subjects(options, ("resnet",))


def _subjects(options: Options, networks: Sequence[str]) -> list[Subject]:
    return [
        Subject(Recipe(network=network, seed=seed, epochs=options.epochs), options)
        for seed in range(options.seeds)
        for network in networks
    ]
