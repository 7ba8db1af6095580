"""The detectors that are attacked, and what happens to attacked images on their way to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bench.paper.data import sets
from bench.paper.draws import AFTER, Draw
from bench.paper.photograph_features import Photographs
from bench.paper.table import Options
from bench.paper.white_box import Partial, WhiteBox, random_box, white_box
from fastgrad import UncertaintyDetector
from fastgrad.blocks import BLOCKS, Activations
from fastgrad.detector.worth import USUAL

#: What the attacked detectors read: the default, and what larger budgets allow.
FORMS: Mapping[str, tuple[str, ...]] = {
    "default": USUAL,
    "with view": (*USUAL, "view"),
    "with bias gradients": (*USUAL, "bias_gradients"),
}
RANDOM = "random layers"
#: Detectors of which one answers, and the share of layers whose activations each reads.
DETECTORS, SHARE = 5, 1 / 3
FALSE_ALARMS = 0.05
#: Attacked photographs, in quick mode and else.
IMAGES = (8, 24)


class Attacked(Photographs):
    """A draw whose own cases are not needed: the attacks are made against each detector.

    In quick mode the draw is a smaller one, and only the default and the random detector are attacked.
    """

    def __init__(self, options: Options) -> None:
        draw = Draw(options.data, options.cache, int(options.quick))
        if options.quick:
            super().__init__(draw, [BLOCKS[name] for name in USUAL], each=2)
        else:
            super().__init__(draw)
        self.images = IMAGES[0 if options.quick else 1]

    def prepare(self) -> None:
        """Extract what detectors are fitted on."""
        _ = self.samples

    def random_parts(self) -> list[Partial]:
        """Detectors that read logits, image statistics and the activations of some layers."""
        X, kinds, _, groups = self.samples
        ends = np.cumsum([place.count for place in Activations().places(self.reading.subject)])
        layers = np.split(np.arange(ends[-1]), ends[:-1])
        rng = np.random.default_rng(self.draw.number)
        parts = []
        for _ in range(DETECTORS):
            chosen = np.sort(rng.permutation(len(layers))[: max(1, round(SHARE * len(layers)))])
            columns = torch.as_tensor(np.concatenate([layers[i] for i in chosen]))
            own = {name: X[name] for name in USUAL}
            own["activations"] = own["activations"][:, columns]
            detector = UncertaintyDetector(log=False).fit(
                own, (kinds != "").astype(int), kinds=kinds, groups=groups
            )
            parts.append(Partial(detector.to_module(), columns))
        return parts

    def boxes(self, example: Tensor) -> dict[str, WhiteBox]:
        """Every detector's."""
        found = {
            form: white_box(self.fitted(blocks), example, FALSE_ALARMS)
            for form, blocks in FORMS.items()
            if {BLOCKS[name] for name in blocks} <= set(self.kinds)
        }
        whole = self.reading.extraction
        usual = whole.of([block for block in whole.blocks if block.name in USUAL])
        parts = self.random_parts()
        return found | {RANDOM: random_box(usual, parts, example, FALSE_ALARMS, self.draw.number)}


def _resized(images: Tensor) -> Tensor:
    """To nine tenths and back."""
    size = images.shape[-2:]
    less = [round(0.9 * side) for side in size]
    resize = functools.partial(interpolate, mode="bilinear", antialias=True)
    return resize(resize(images, size=less), size=size).clamp(0, 1)


def _cropped(images: Tensor) -> Tensor:
    """The middle nine tenths, enlarged."""
    height, width = images.shape[-2:]
    top, left = round(0.05 * height), round(0.05 * width)
    middle = images[..., top : height - top, left : width - left]
    return interpolate(middle, size=(height, width), mode="bilinear", antialias=True).clamp(0, 1)


#: What happens to images between the attack and the network.
WAYS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda images: images,
    AFTER: sets.compress,
    " after resizing": _resized,
    " after a crop": _cropped,
}
