"""The last linear layer: its input h, and the squared norms of its gradients for all contrast classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fastgrad.blocks.block import JOINT, Array, Block, Part, Settings
from fastgrad.blocks.forward import Pass, Reading
from fastgrad.blocks.subject import Subject
from fastgrad.gradients.contrasts import contrast_sqnorm
from fastgrad.scores.rows import ScoreRows


class Features(Block):
    """h ``(B, D)``; its score is the shrunk Mahalanobis distance of the standardised columns."""

    name = "features"
    alarm = "last features unlike those of known inputs"

    def refusal(self, subject: Subject) -> str | None:
        return None if subject.head is not None else "the network does not end in a linear layer"

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        return () if subject.head is None else (Reading(subject.head, lambda inputs, _: inputs[0]),)

    def values(self, found: Pass) -> Tensor:
        return found.readings(self.name)[0]

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield cls.distance(blocks, settings)

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> ScoreRows:
        return cls.rows(blocks, settings, **JOINT)


class Contrasts(Features):
    """`fastgrad.contrast_sqnorm` of h and the logits, ``(B, N)``: a function of the softmax and ``||h||`` alone."""

    name = "contrasts"
    alarm = "other answers unusually near or far"
    ranks = (2, 3, 4)
    shapes = "(B, N), (B, N, P) or (B, S, N, P)"
    squared_norms = True

    def values(self, found: Pass) -> Tensor:
        return contrast_sqnorm(super().values(found), found.logits, bias=found.subject.bias, log=found.log)

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield cls.mixture(blocks, settings, rank=True)

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> ScoreRows:
        return cls.rows(blocks, settings, rank=True)
