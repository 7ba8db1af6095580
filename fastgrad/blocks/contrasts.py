"""Squared norms of the last layer's gradients for all contrast classes, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fastgrad.blocks.block import Array, Part, Settings
from fastgrad.blocks.features import Features
from fastgrad.blocks.forward import Pass
from fastgrad.gradients import contrasts as functional
from fastgrad.scores.rows import ScoreRows


class Contrasts(Features):
    """`fastgrad.contrast_sqnorm` of h and the logits, ``(B, N)``: a function of the softmax and ``||h||`` alone."""

    name = "contrasts"
    alarm = "other answers unusually near or far"
    ranks = (2, 3, 4)
    shapes = "(B, N), (B, N, P) or (B, S, N, P)"
    squared_norms = True

    def values(self, found: Pass) -> Tensor:
        (h,) = found.readings(self.name)
        return functional.contrast_sqnorm(h, found.logits, bias=found.subject.bias, log=found.log)

    @classmethod
    def scores(cls, blocks: Mapping[str, Array], settings: Settings) -> Iterator[Part]:
        yield cls.mixture(blocks, settings, rank=True)

    @classmethod
    def joint(cls, blocks: Mapping[str, Array], settings: Settings) -> ScoreRows:
        return cls.rows(blocks, settings, rank=True)
