"""The last linear layer: its input h, and the squared norms of its gradients for all contrast classes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from fastgrad.blocks.block import JOINT, Block
from fastgrad.blocks.forward import Pass, Reading
from fastgrad.blocks.subject import Subject
from fastgrad.gradients.contrasts import contrast_sqnorm
from fastgrad.scores.one_class import distance, mixture


class Penultimate(Block):
    """h ``(B, D)``; its score is the shrunk Mahalanobis distance of the standardised columns."""

    name = "features"
    alarm = "last features unlike those of known inputs"
    scores = (distance,)
    classified: ClassVar[Mapping[str, Any]] = JOINT

    def refusal(self, subject: Subject) -> str | None:
        return None if subject.head is not None else "the network does not end in a linear layer"

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        return () if subject.head is None else (Reading(subject.head, lambda inputs, _: inputs[0]),)

    def values(self, forward: Pass) -> Tensor:
        return forward.readings(self.name)[0]


class Contrasts(Penultimate):
    """`fastgrad.contrast_sqnorm` of h and the logits, ``(B, N)``: a function of the softmax and ``||h||`` alone."""

    name = "contrasts"
    alarm = "other answers unusually near or far"
    ranks = (2, 3, 4)
    shapes = "(B, N), (B, N, P) or (B, S, N, P)"
    squared_norms = True
    scores = (partial(mixture, rank=True),)
    classified: ClassVar[Mapping[str, Any]] = {"rank": True}

    def values(self, forward: Pass) -> Tensor:
        return contrast_sqnorm(super().values(forward), forward.logits, bias=forward.subject.bias, log=forward.log)
