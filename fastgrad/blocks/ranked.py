"""Contrasts of the classes of highest logit through the whole network, in order of rank."""

from __future__ import annotations

from typing import ClassVar

from fastgrad.blocks.gradients import Gradients
from fastgrad.blocks.signals import Signal, of_rank
from fastgrad.blocks.subject import Subject

#: Classes whose contrasts are sent back.
RANKS = 10


class Ranked(Gradients):
    """Squared gradient norms of every parameter for "why not Q?", Q the K classes of highest logit, ``(B, K, P)``.

    The contrasts of Prabhushankar and AlRegib, "Introspective Learning: A Two-Stage Approach for Inference in Neural
    Networks" (2022), through the whole network; by rank, so that what is learned does not depend on class names.
    """

    name = "ranked"
    alarm = "an unusual pattern of what would have to change for another answer"
    ranks: ClassVar[tuple[int, ...]] = (3,)
    shapes = "(B, K, P)"

    def signals(self, subject: Subject) -> tuple[Signal, ...]:
        """One for each rank."""
        return tuple(of_rank(rank) for rank in range(min(RANKS, subject.classes)))
