"""A draw of photographs to fit, calibrate and test on, and the cases that a detector is to find.

    draw = Draw(data, cache, 0)
    clean, labels = draw.clean("fit")       # (360, 3, 224, 224) in [0, 1]; also "calibration", "test"
    for name in CASES:
        case = draw.case(name)              # of an attack the images that mislead the network
        case.images, case.group, case.rate

The network takes `photographs.inputs` of such images. Attacks and corruptions are made from the crops, so that nothing
compresses them afterwards unless their name says so. They take minutes to make and are kept in ``cache``, in files
whose names end in a digest of how they are made, the network's weights, and the photographs that they are made from.
"""

from __future__ import annotations

import re
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.paper import cache
from bench.paper.data import sets
from bench.paper.data.attacks import attack
from bench.paper.data.corruptions import corrupt
from bench.paper.data.photographs import network, photographs, predicted, stranger

ATTACKS: Mapping[str, Mapping[str, Any]] = {
    "FGSM 2/255": {"name": "FGSM", "epsilon": 2 / 255},
    "PGD 2/255": {"name": "PGD", "epsilon": 2 / 255},
    "PGD 8/255": {"name": "PGD", "epsilon": 8 / 255},
    "BIM 4/255": {"name": "BIM", "epsilon": 4 / 255},
    "C&W": {"name": "C&W", "carlini": (3, 40, 0.01, 1.0)},
    "DeepFool": {"name": "DeepFool"},
}
#: Their perturbations are smaller than the steps of a byte and are kept as such, in half precision.
FINE = ("C&W", "DeepFool")
STRANGERS = {
    "textures": "large textures",
    "CIFAR-100": "cifar100",
    "grey scenes": "scenes",
    "letters": "letters",
}
#: Kinds that `fastgrad.challenges` generates in a form of its own, and kinds that it has nothing like.
FAMILIAR = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "brightness", "contrast",
            "jpeg_compression")  # fmt: skip
FOREIGN = ("frost", "fog", "snow", "spatter", "pixelate", "elastic_transform", "saturate", "motion_blur")
SEVERITY = 2
AFTER = " after JPEG"
#: What the compression of attacked images does alone: the control of attacks after JPEG, in no other mean.
CONTROL = "JPEG, not attacked"

#: Name and group of every case.
CASES: Mapping[str, str] = (
    dict.fromkeys(ATTACKS, "attacks")
    | {name + AFTER: "attacks after JPEG" for name in ATTACKS}
    | dict.fromkeys(STRANGERS, "other sets")
    | dict.fromkeys(FAMILIAR, "corruptions like generated ones")
    | dict.fromkeys(FOREIGN, "corruptions unlike generated ones")
    | {CONTROL: f"{CONTROL} (control)"}
)


@dataclass(frozen=True)
class Sizes:
    """Photographs to fit, to calibrate and to test on, and images of each case."""

    fit: int
    calibration: int
    test: int
    case: int


#: Of each draw from the 1,000 photographs. This package's choices were compared on the first three, with
#: EfficientNet-Lite0.
DRAWS = (
    Sizes(360, 240, 400, 120),
    Sizes(240, 160, 200, 60),
    Sizes(240, 160, 200, 60),
    Sizes(160, 80, 160, 40),
)
COMPARED = 3
#: EfficientNets of these sizes.
NETWORKS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")


@dataclass(frozen=True)
class Case:
    """Images that a detector is to find.

    Attributes:
        name: A key of `CASES`.
        group: What kind of case it is.
        images: ``(n, 3, 224, 224)`` in [0, 1]; of an attack only those that mislead the network.
        source: Which photographs they are made from ``(n,)``; -1 for other sets.
        tried: Images that were attacked, all rightly classified; ``n`` where it is no attack.
    """

    name: str
    group: str
    images: Tensor
    source: NDArray[np.int64]
    tried: int

    @property
    def rate(self) -> float:
        """Share of the attacked images that mislead the network; 1 where it is no attack."""
        return len(self.images) / self.tried


class Draw:
    """One way to deal the photographs, and its cases.

    Args:
        root: Folder with the data.
        folder: Where attacked and corrupted images are kept.
        number: Which of ``sizes``; the first draw is 0.
        sizes: Of every draw.
        network: Of `NETWORKS`.

    Raises:
        ValueError: ``network`` is none of them.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        number: int,
        sizes: tuple[Sizes, ...] = DRAWS,
        network: str = NETWORKS[0],
    ) -> None:
        if network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}; it was {network!r}")
        self.root, self.folder, self.number, self.sizes = root, folder, number, sizes[number]
        self.network = network
        # Draws take other images of the other sets, too.
        self.first = sum(one.case for one in sizes[:number])

    @property
    def name(self) -> str:
        """``draw 1``, ``draw 2``, ..."""
        return f"draw {self.number + 1}"

    @cached_property
    def places(self) -> dict[str, NDArray[np.int64]]:
        """Which photographs belong to ``fit``, ``calibration`` and ``test``."""
        total, sizes = len(photographs(self.root).images), self.sizes
        ends = np.cumsum([sizes.fit, sizes.calibration, sizes.test])
        if ends[-1] > total:
            raise ValueError(
                f"a draw of {ends[-1]} photographs needs as many in {self.root}; there are {total}"
            )
        order = np.random.default_rng(self.number).permutation(total)[: ends[-1]]
        return dict(zip(("fit", "calibration", "test"), np.split(order, ends[:-1]), strict=True))

    def clean(self, part: str) -> tuple[Tensor, Tensor]:
        """Photographs ``(n, 3, 224, 224)`` in [0, 1] of a part, and their labels."""
        split, places = photographs(self.root), self.places[part]
        assert split.labels is not None
        return sets.to_tensor(split.images[places]), torch.from_numpy(split.labels[places])

    @cached_property
    def model(self) -> nn.Module:
        """The network of pixels, in the memory layout that is fastest here; its parameters ask for no gradient."""
        made = network(pixels=True, size=NETWORKS.index(self.network))
        return made.requires_grad_(False).to(memory_format=torch.channels_last)

    @cached_property
    def weights(self) -> str:
        """A digest of the network's weights."""
        return cache.digest(self.model)

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Which of the test photographs the network classifies rightly."""
        images, labels = self.clean("test")
        found = self._kept("right", {}, self.places["test"], lambda: {"class": predicted(self.model, images)})
        right: NDArray[np.bool_] = found["class"] == labels.numpy()
        return right

    def prepare(self) -> None:
        """Make what the cache lacks; progress goes to standard error."""
        for name in CASES:
            start = time.perf_counter()
            case = self.case(name)
            print(f"{self.name}, {name}: {len(case.images)} of {case.tried} images, "
                  f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)  # fmt: skip

    def case(self, name: str) -> Case:
        """One of `CASES`, from the cache or made now and kept there."""
        if name not in CASES:
            raise ValueError(f"name must be one of {', '.join(CASES)}; it was {name!r}")
        count = self.sizes.case
        if name in STRANGERS:
            images = stranger(self.root, STRANGERS[name], count, self.first)
            return Case(name, CASES[name], images, np.full(count, -1), count)
        if name in (*FAMILIAR, *FOREIGN, CONTROL):
            source = self.places["test"][:count]
            images = self._corrupted(name, source)
            return Case(name, CASES[name], images, source, count)
        return self._attacked(name, self.places["test"][self.right][:count])

    def _corrupted(self, name: str, source: NDArray[np.int64]) -> Tensor:
        recipe = {
            "corruption": name,
            "severity": SEVERITY,
            "seed": zlib.crc32(f"{self.number}/{name}".encode()),
        }
        images = sets.to_tensor(photographs(self.root).images[source])
        if name == CONTROL:
            return sets.compress(images)

        def make() -> dict[str, NDArray[Any]]:
            return {"images": sets.to_bytes(corrupt(images, name, SEVERITY, seed=recipe["seed"]))}

        return sets.to_tensor(self._kept(name, recipe, source, make)["images"])

    def _attacked(self, name: str, source: NDArray[np.int64]) -> Case:
        plain, split = name.removesuffix(AFTER), photographs(self.root)
        clean, labels = sets.to_tensor(split.images[source]), split.labels[source]  # type: ignore[index]
        recipe = {**ATTACKS[plain], "seed": self.number}

        def make() -> dict[str, NDArray[Any]]:
            parts = [
                attack(self.model, x.contiguous(memory_format=torch.channels_last), y, **recipe)
                for x, y in zip(clean.split(8), torch.from_numpy(labels).split(8), strict=True)
            ]
            change = (torch.cat(parts) - clean).contiguous()
            kept = (
                {"change": change.half().numpy()}
                if plain in FINE
                else {"images": sets.to_bytes(clean + change)}
            )
            images = _pixels(kept, clean)
            again = sets.compress(images)
            found = {"class": predicted(self.model, images), "class" + AFTER: predicted(self.model, again)}
            return kept | found

        kept = self._kept(plain, recipe, source, make)
        misled = kept["class" + (AFTER if name != plain else "")] != labels
        images = _pixels(kept, clean)[torch.from_numpy(misled)]
        if name != plain:
            images = sets.compress(images)
        return Case(name, CASES[name], images, source[misled], len(source))

    def _kept(
        self,
        name: str,
        recipe: Mapping[str, Any],
        source: NDArray[np.int64],
        make: Callable[[], Mapping[str, NDArray[Any]]],
    ) -> cache.Arrays:
        key = cache.digest(name, recipe, self.weights, source, photographs(self.root).images[source])
        slug = re.sub(r"[^A-Za-z0-9]+", "-", name)
        return cache.arrays(self.folder / "photographs" / f"{slug}-{key}.npz", make)


def _pixels(kept: Mapping[str, NDArray[Any]], clean: Tensor) -> Tensor:
    """Attacked images as floats, from what the cache holds."""
    if "images" in kept:
        return sets.to_tensor(kept["images"])
    return (clean + torch.from_numpy(kept["change"]).float()).clamp(0, 1)
