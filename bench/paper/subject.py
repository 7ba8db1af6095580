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

from bench.paper import cache, own, published
from bench.paper.cache import Arrays
from bench.paper.data import sets
from bench.paper.data.attacks import attack
from bench.paper.data.corruptions import corrupt
from bench.paper.networks import Classifier
from bench.paper.table import Options
from bench.paper.train import EPOCHS, HELD_OUT, Recipe, trained
from fastgrad import UncertaintyDetector
from fastgrad.blocks import Gradients
from fastgrad.detector.budget import Report

#: Searches, steps, step size and first constant of C&W in full mode; the default is shorter.
THOROUGH = (5, 100, 0.05, 0.1)
#: Images at a time: the layers' outputs stay in the processor's cache.
BATCH = 32


class Subject:
    """A network and everything measured on it.

    A case is a path: ``clean``, ``attack/FGSM``, ``compressed/FGSM``, ``ood/svhn``, ``corruption/fog/3``
    or ``control/grey``. Its ``part`` says from which clean images it is made: ``"test"`` (test
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
        """The trained network, in evaluation mode and in the memory layout that is fastest here."""
        model = trained(self.recipe, self.options.data, self.options.cache).requires_grad_(False)
        return model.to(memory_format=torch.channels_last)

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
            both = sets.stranger(options.data, name, self.test, 2 * options.strangers)
            return both[: options.strangers] if part == "test" else both[options.strangers :]
        images, labels = self.clean(part)
        if kind == "compressed":
            return sets.compress(self.images(f"attack/{name}", part))
        if kind == "control":
            return sets.to_tensor(sets.grey(sets.to_bytes(images[: options.case])))
        if kind == "corruption":
            corruption, _, severity = name.partition("/")
            count = options.cell if part == "test" else options.case
            return corrupt(images[:count], corruption, int(severity), seed=seed)
        count = options.case if part == "test" else options.learn
        right = torch.from_numpy(self.correct(part)).nonzero()[:count, 0]

        def make() -> Arrays:
            how = {} if options.quick else {"carlini": THOROUGH}
            return {
                "images": attack(self.model, images[right], labels[right], name, seed=seed, **how).numpy()
            }

        return torch.from_numpy(self.kept(case, part, make)["images"])

    def blocks(self, case: str, part: str = "test") -> Arrays:
        """What this package's detectors read of a case's images, `own.BLOCKS`."""
        if (case, part) == ("clean", "fit"):
            return {name: values.numpy() for name, values in self.samples.clean.blocks.items()}
        return self.kept(
            f"blocks-{own.extracted()}/{case}", part, lambda: self.reading.blocks(self.images(case, part))
        )

    def gradients(self, case: str, part: str = "test") -> Arrays:
        """Logarithms of the squared norms of every parameter's gradient, as the published detector reads them."""
        whole = self.reading.extraction.of([Gradients()])
        return self.kept(
            f"gradients/{case}", part, lambda: self.reading.blocks(self.images(case, part), whole)
        )

    @cached_property
    def reading(self) -> own.Reading:
        """What is read of the network."""
        return own.Reading(self.model, self.clean("test")[0][:BATCH])

    @cached_property
    def samples(self) -> own.Samples:
        """The clean images of the part ``"fit"`` and challenges generated from them."""
        batches = own.batches(self.clean("fit"), BATCH)
        make = lambda: self.reading.samples(batches, self.recipe.seed)  # noqa: E731
        return own.read(self.kept(f"samples/{own.generation()}", "fit", make))

    @cached_property
    def own(self) -> dict[str, tuple[Report, UncertaintyDetector]]:
        """This package's detectors: three budgets, and the controls."""
        return own.own(self.reading, self.samples)

    @cached_property
    def seen(self) -> tuple[list[Tensor], Tensor]:
        """Features after the stem and every stage on images that the network was trained on, and their labels."""
        images, labels = self.clean("seen")
        with torch.no_grad():
            parts = [self.model.stage_features(part) for part in torch.split(images, 256)]
        return [torch.cat(stage) for stage in zip(*parts, strict=True)], labels

    def published(self, names: Sequence[str] | None = None) -> dict[str, published.FromBlocks]:
        """The published detectors ``names``, or all, that need only logits and h, fitted on images of the training."""
        features, labels = self.seen
        noise = torch.rand(256, *self.clean("test")[0].shape[1:], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            fit = {"features": features[-1], "logits": self.model.fc(features[-1])}
            return published.from_outputs(fit, self.model.fc, labels, self.model.features(noise), names)

    def kept(self, case: str, part: str, make: Callable[[], Arrays]) -> Arrays:
        """Arrays made for a case, from the cache or made now; the sizes are part of the file's name."""
        options = self.options
        sizes = f"{options.fit}-{options.test}-{options.case}-{options.strangers}-{options.cell}"
        if "attack/" in case and part == "fit":
            sizes += f"-{options.learn}"
        return cache.arrays(self.folder / f"{case.replace('/', '_')}-{part}-{sizes}.npz", make)


def both_networks(options: Options) -> list[Subject]:
    """The network that was asked for, or both small ones, a residual and a densely connected; one for each seed."""
    return _subjects(options, (options.network,) if options.network else ("resnet", "densenet"))


def residual_networks(options: Options) -> list[Subject]:
    """The network that was asked for, or a small residual one, for each seed."""
    return _subjects(options, (options.network or "resnet",))


def _subjects(options: Options, networks: Sequence[str]) -> list[Subject]:
    return [
        Subject(Recipe(network=network, seed=seed, epochs=EPOCHS.get(network, options.epochs)), options)
        for seed in range(options.seeds)
        for network in networks
    ]
