"""One trained network with the images of every case and their features, kept on disk once made."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.paper import data
from bench.paper.attacks import attack
from bench.paper.common import Options
from bench.paper.corruptions import corrupt
from bench.paper.networks import Classifier
from bench.paper.train import HELD_OUT, Recipe, trained
from fastgrad.blocks.extraction import Extraction
from fastgrad.challenges import challenge_names, generate_challenges

#: Kinds of generated challenge that one clean image gives, as in `TwoStageModel.fit`.
PER_IMAGE = 2
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
        self.folder = options.cache / "features" / Path(recipe.file()).stem
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def model(self) -> Classifier:
        """The trained network, in evaluation mode."""
        return trained(self.recipe, self.options.data, self.options.cache)

    @cached_property
    def test(self) -> data.Split:
        """Test images."""
        return data.load(self.options.data, self.recipe.dataset, "test", self.options.test)

    def clean(self, part: str) -> tuple[Tensor, Tensor]:
        """Clean images and labels of a part; ``"seen"`` gives images that the network was trained on."""
        if part not in self._clean:
            where = {"fit": (self.options.fit, -HELD_OUT), "seen": (4000, 0)}.get(part)
            split = data.load(self.options.data, self.recipe.dataset, "train", *where) if where else self.test
            assert split.labels is not None
            self._clean[part] = split.tensor(), torch.from_numpy(split.labels)
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
            both = data.stranger(options.data, name, self.test, 2 * options.case)
            return both[: options.case] if part == "test" else both[options.case :]
        images, labels = self.clean(part)
        if kind == "compressed":
            return data.to_tensor(data.jpeg(data.to_bytes(self.images(f"attack/{name}", part))))
        if kind == "control":
            return data.to_tensor(data.grey(data.to_bytes(images[: options.case])))
        if kind == "corruption":
            corruption, _, severity = name.partition("/")
            count = options.cell if part == "test" else options.case
            return corrupt(images[:count], corruption, int(severity), seed=seed)
        if kind == "generated":
            return self._generated()
        count = options.case if part == "test" else options.learn
        right = torch.from_numpy(self.correct(part)).nonzero()[:count, 0]
        path = self.path(case, part, ".npy")
        if path.exists():
            return torch.from_numpy(np.load(path))
        attacked = attack(
            self.model, images[right], labels[right], name, seed=seed, thorough=not options.quick
        )
        _write(path, lambda file: np.save(file, attacked.numpy()))
        return attacked

    def blocks(self, case: str, part: str = "test") -> Arrays:
        """Features of a case's images: the blocks of `Extraction`, logarithms of squared norms."""
        return cached(
            self.path(case, part, ".npz"), lambda: extract(self.extraction, self.images(case, part))
        )

    @cached_property
    def extraction(self) -> Extraction:
        """What turns images into blocks, as in `TwoStageModel`; planned once."""
        return Extraction(self.model)

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

    def path(self, case: str, part: str, suffix: str) -> Path:
        """Where a case's images or features are kept; the sizes are part of the name."""
        options = self.options
        sizes = f"{options.fit}-{options.test}-{options.case}-{options.cell}"
        if case.startswith("attack/") and part == "fit":
            sizes += f"-{options.learn}"
        return self.folder / f"{case.replace('/', '_')}-{part}-{sizes}{suffix}"


def cached(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays in ``path``, or those that ``make`` returns, kept there."""
    if path.exists():
        with np.load(path) as archive:
            return dict(archive)
    found = make()
    _write(path, lambda file: np.savez(file, **found))
    return found


def _write(path: Path, write: object) -> None:
    """Write a file so that another process never sees half of it."""
    partial = path.with_suffix(f".{os.getpid()}")
    with open(partial, "wb") as file:
        write(file)  # type: ignore[operator]
    partial.replace(path)
