"""Scores of this package's detectors, and every method's AUROC; higher is less reliable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.paper.rows import Found
from bench.paper.subject import Arrays, Subject
from fastgrad.estimators import UncertaintyDetector
from fastgrad.metrics import auroc

Scores = NDArray[np.float64]
FromBlocks = Callable[[Arrays], Scores]
FromImages = Callable[[Tensor], Scores]


@dataclass(frozen=True)
class Methods:
    """Fitted detectors by name: those that read the blocks of features, and those that read images."""

    blocks: Mapping[str, FromBlocks]
    images: Mapping[str, FromImages] = field(default_factory=dict)

    def scores(self, subject: Subject, case: str, keep: Any = slice(None)) -> dict[str, Scores]:
        """Every method's scores on the images ``keep`` of a case."""
        blocks = {name: values[keep] for name, values in subject.blocks(case).items()}
        found = {name: score(blocks) for name, score in self.blocks.items()}
        if self.images:
            images = subject.images(case)[keep]
            found |= {name: score(images) for name, score in self.images.items()}
        return found

    def compare(
        self,
        subject: Subject,
        network: str,
        cases: Mapping[str, str],
        *,
        against: str = "clean",
        keep: Any = slice(None),
    ) -> Found:
        """AUROC of every method.

        Args:
            subject: The network.
            network: What the table calls it.
            cases: What the table calls a case, and the subject's path of it.
            against: The path of the negatives.
            keep: Which of the negatives count.
        """
        negative = self.scores(subject, against, keep)
        return {
            (network, name, method): auroc(negative[method], values)
            for name, case in cases.items()
            for method, values in self.scores(subject, case).items()
        }


def stack(parts: Sequence[Mapping[str, NDArray[np.float32]]]) -> Arrays:
    """Rows of several cases after each other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


#: The default detector without some of its blocks. The last three are controls: what remains without gradients.
VARIANTS: dict[str, tuple[str, ...]] = {
    "fastgrad": (),
    "without image statistics": ("image",),
    "without gradients (control)": ("gradients",),
    "logits and h alone (control)": ("gradients", "image"),
    "image statistics alone (control)": ("gradients", "logits", "features"),
}


def without(blocks: Arrays, names: Sequence[str]) -> Arrays:
    """The blocks less those of ``names``."""
    return {name: values for name, values in blocks.items() if name not in names}


def one_class(subject: Subject) -> UncertaintyDetector:
    """The detector fitted on clean features alone."""
    return UncertaintyDetector(log=False).fit(subject.blocks("clean", "fit"), held_out=subject.held_out)


def labelled(subject: Subject, cases: Sequence[str]) -> UncertaintyDetector:
    """The detector fitted on clean features and on challenging ``cases``, made from held-out images."""
    parts = [subject.blocks("clean", "fit"), *(subject.blocks(case, "fit") for case in cases)]
    sizes = [len(part["logits"]) for part in parts]
    kinds = np.repeat(["", *cases], sizes)
    held_out = np.concatenate([subject.held_out, np.zeros(sum(sizes[1:]), bool)])
    detector = UncertaintyDetector(log=False)
    return detector.fit(stack(parts), (kinds != "").astype(int), kinds=kinds, held_out=held_out)


def default(subject: Subject, omitted: Sequence[str] = ()) -> UncertaintyDetector:
    """What `TwoStageModel.fit` makes of clean images alone: H on generated challenges, one-class scores.

    ``omitted`` names blocks that it does not see.
    """
    clean, challenging = (without(subject.blocks(case, "fit"), omitted) for case in ("clean", "generated"))
    names = [name.partition("-")[0] for name, group in subject.generated_kinds() for _ in group]
    kinds = np.array([""] * len(next(iter(clean.values()))) + names)
    held_out = np.concatenate([subject.held_out, np.zeros(len(names), bool)])
    labels = (kinds != "").astype(int)
    detector = UncertaintyDetector(log=False)
    return detector.fit(stack([clean, challenging]), labels, kinds=kinds, held_out=held_out)


def from_clean(subject: Subject) -> dict[str, FromBlocks]:
    """Every detector of this package that has seen no labels: the default's variants and the one-class one."""
    fitted = {name: default(subject, omitted) for name, omitted in VARIANTS.items()}
    fitted["fastgrad one-class"] = one_class(subject)
    return {name: partial(scores, detector) for name, detector in fitted.items()}


def scores(detector: UncertaintyDetector, blocks: Arrays) -> Scores:
    """``decision_function`` on those blocks that the detector was fitted on."""
    found: Scores = detector.decision_function({name: blocks[name] for name in detector.shapes_})
    return found


def h_alone(detector: UncertaintyDetector, blocks: Arrays) -> Scores:
    """The score of a labelled detector's H without the one-class scores beside it."""
    return detector.explain({name: blocks[name] for name in detector.shapes_})["labels"]
