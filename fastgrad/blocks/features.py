"""h, what enters the last linear layer, and the distance to its nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fastgrad.blocks.block import Array, Block, Part, Settings
from fastgrad.blocks.passes import Pass
from fastgrad.blocks.subject import Subject
from fastgrad.engine.run import Reading
from fastgrad.scores.conformal import OneSided
from fastgrad.scores.neighbours import NearestNeighbours
from fastgrad.scores.rows import Rows

#: Principal components that H sees.
_COMPONENTS = 64


def head_input(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """H ``(B, D)``."""
    value: Tensor = inputs[0]
    return value.detach()


class Features(Block):
    """h ``(B, D)`` (Sun et al., "Out-of-distribution detection with deep nearest neighbors", 2022)."""

    name = "features"
    alarm = "no similar input among the known ones"
    shapes = "(B, D)"

    def refusal(self, subject: Subject) -> str | None:
        """A network that does not end in a linear layer."""
        return None if subject.head is not None else "the network does not end in a linear layer"

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        """The last layer's input."""
        return () if subject.head is None else (Reading(subject.head, head_input),)

    def values(self, found: Pass) -> Tensor:
        """H."""
        return found.readings(self.name)[0]

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> Rows:
        """Standardised, or the leading principal components where h is wide."""
        return Rows.fit(blocks, cls.name, dimensions=_COMPONENTS)

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        """Distance to the k-th nearest clean sample, all of unit length.

        Beside other blocks only where a class may have k clean samples: with fewer of them than k for each class, the
        k-th nearest is of another class for usual inputs, too.
        """
        classes = blocks["logits"].shape[1] if "logits" in blocks else 1
        if len(blocks) > 1 and len(blocks[cls.name]) < settings.neighbours * classes:
            return
        rows = Rows.fit(blocks, cls.name, unit=True, standardise=False)
        bank = NearestNeighbours.fit(rows.of(blocks), settings.neighbours)
        yield f"{cls.name}_neighbours", rows, bank, OneSided
