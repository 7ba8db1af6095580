"""Every method's scores and AUROC on a network's cases; higher is less reliable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from bench.paper import own
from bench.paper.own import scores
from bench.paper.published import FromBlocks, FromImages, Scores
from bench.paper.rows import Found
from bench.paper.subject import Subject
from fastgrad.detector import UncertaintyDetector
from fastgrad.detector.budget import Report
from fastgrad.metrics import auroc

#: Detectors that saw no challenge at all: the blocks that the budget allows, and the squared norms of all gradients.
ONE_CLASS = ("fastgrad one-class", "gradients one-class")


@dataclass(frozen=True)
class Methods:
    """Fitted detectors by name: those that read the blocks of features, and those that read images."""

    blocks: Mapping[str, FromBlocks]
    images: Mapping[str, FromImages] = field(default_factory=dict)

    def scores(self, subject: Subject, case: str, keep: Any = slice(None)) -> dict[str, Scores]:
        """Every method's scores on the images ``keep`` of a case."""
        blocks = subject.blocks(case) | (subject.gradients(case) if ONE_CLASS[1] in self.blocks else {})
        blocks = {name: values[keep] for name, values in blocks.items()}
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


def one_class(subject: Subject) -> tuple[Report, UncertaintyDetector]:
    """The default without generated challenges."""
    return subject.reading.fit(subject.reading.candidates(own.BUDGETS[0]), subject.samples.clean)


def labelled(
    subject: Subject, case: str, blocks: Callable[[str], Mapping[str, Any]], names: Sequence[str]
) -> UncertaintyDetector:
    """H and one-class scores on the blocks ``names``, trained on a case's images of the part ``"fit"``.

    Args:
        subject: The network.
        case: The path of the images.
        blocks: From a path to the blocks of its part ``"fit"``.
        names: Of the blocks that are read.
    """
    clean, other = ({name: blocks(path)[name] for name in names} for path in ("clean", case))
    counts = [len(side[names[0]]) for side in (clean, other)]
    kinds = np.repeat(["", case], counts)
    joined = {name: np.concatenate([clean[name], other[name]]) for name in names}
    return UncertaintyDetector(log=False).fit(joined, (kinds != "").astype(int), kinds=kinds)


def from_clean(subject: Subject, *, gradients: bool = True) -> dict[str, FromBlocks]:
    """Every detector of this package that has seen no labels: budgets, controls, and the one-class ones.

    ``gradients`` says whether the squared norms of all parameters' gradients are among them, eight passes an image.
    """
    fitted = {name: detector for name, (_, detector) in subject.own.items()}
    fitted[ONE_CLASS[0]] = one_class(subject)[1]
    if gradients:
        fitted[ONE_CLASS[1]] = UncertaintyDetector(log=False).fit(subject.gradients("clean", "fit"))
    return {name: partial(scores, detector) for name, detector in fitted.items()}


def h_alone(detector: UncertaintyDetector, blocks: Mapping[str, Any]) -> Scores:
    """The score of a labelled detector's H without the one-class scores beside it."""
    return detector.explain(own.visible(detector, blocks))["labels"]
