"""h, the input of the last linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fastgrad.blocks.block import JOINT, Array, Block, Part, Settings
from fastgrad.blocks.forward import Pass, Reading
from fastgrad.blocks.subject import Subject
from fastgrad.scores.rows import ScoreRows


class Features(Block):
    """h ``(B, D)``; its score is the shrunk Mahalanobis distance of the standardised columns."""

    name = "features"
    alarm = "last features unlike those of known inputs"
    shapes = "(B, D)"

    def refusal(self, subject: Subject) -> str | None:
        return None if subject.head is not None else "the network does not end in a linear layer"

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        return () if subject.head is None else (Reading(subject.head, lambda inputs, _: inputs[0]),)

    def values(self, found: Pass) -> Tensor:
        return found.readings(self.name)[0]

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> ScoreRows:
        return cls.rows(blocks, settings, **JOINT)

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield cls.distance(blocks, settings)
