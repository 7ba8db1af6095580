"""The network's own answer: its logits, their energy and the margin between the two highest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fastgrad.blocks.block import Array, Block, Part, Settings
from fastgrad.blocks.extraction import Pass
from fastgrad.scores.logits import Energy, Margin
from fastgrad.scores.rows import Rows

#: Logits that the challenge classifier reads, in falling order.
_HIGHEST = 10


class Logits(Block):
    """Logits ``(B, N)``.

    Energy is two-sided: an attack may make the network more certain than any clean input does. The margin is
    one-sided: an attack that stops at the boundary leaves a small one.
    """

    name = "logits"
    alarm = "class scores unusually weak, strong or close together"
    shapes = "(B, N)"

    def values(self, found: Pass) -> Tensor:
        return found.logits

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield "energy", Rows.fit(blocks, cls.name, standardise=False), Energy(two_sided=True)
        if blocks[cls.name].shape[1] > 1:
            yield "margin", Rows.fit(blocks, cls.name, top=2, standardise=False), Margin()

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> Rows:
        """The highest logits in falling order: the classifier must not depend on the order of classes."""
        return cls.rows(blocks, settings, top=_HIGHEST)
