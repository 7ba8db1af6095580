"""The base class of blocks: features that a detector reads from an input.

A block says which modules of the network it reads; all blocks share one forward pass, and `View` and `Gradients` make
more. It names its one-class scores, which `fastgrad.scores` defines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastgrad.blocks.forward import Pass, Reading
from fastgrad.blocks.subject import Subject
from fastgrad.scores.fitted import FittedList
from fastgrad.scores.one_class import OneClass

#: Name of the challenge classifier among the names of evidence; the others are blocks.
CHALLENGE_CLASSIFIER = "challenges"
#: Principal components of h and of activations that the challenge classifier sees, and the columns beside them: most of
#: what a challenge changes lies in directions in which clean data do not vary. AUROC with and without the columns:
#: EfficientNet-Lite0 .906 and .902 (1,024 columns .903, all 21,008 .906), ResNet-20, attacks after JPEG, .640 and .617.
JOINT = {"dimensions": 64, "extra_columns": 4096}


class Block:
    """Base class of all blocks.

    Attributes:
        name: The block's key in feature mappings, and the name of its part of the detector.
        alarm: What its alarm means, in plain words that can follow "Mostly because:"; if empty, its name stands there.
        ranks: Numbers of dimensions that its tensor may have.
        shapes: The allowed shapes, in words.
        squared_norms: Whether it holds squared norms, of which detectors take logarithms.
        live: Whether only a live model can serve it: an exported file has no gradients.
        price: The predicted price in forward passes, in addition to the one that gives the logits.
        scores: How it is scored: functions of `fastgrad.scores.one_class`.
        classified: What the challenge classifier sees of it: arguments of `fastgrad.scores.rows.ScoreRows.fit`.
    """

    name: ClassVar[str]
    alarm: ClassVar[str] = ""
    ranks: ClassVar[tuple[int, ...]] = (2,)
    shapes: ClassVar[str] = "(B, D)"
    squared_norms: ClassVar[bool] = False
    live: ClassVar[bool] = False
    price: ClassVar[float] = 0.0
    scores: ClassVar[tuple[OneClass, ...]] = ()
    classified: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        """Refuse a name that a part of a detector cannot have."""
        super().__init_subclass__()
        name = getattr(cls, "name", "")
        if "." in name or name == CHALLENGE_CLASSIFIER or hasattr(FittedList(), name):
            raise ValueError(
                f"name of a block must have no dot and be none of PyTorch's or fastgrad's; it was {name!r}"
            )

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that recreate this block (JSON)."""
        return {}

    def refusal(self, subject: Subject) -> str | None:
        """Return why this block cannot serve a network or input, or None if it can."""
        return None

    def readings(self, subject: Subject, mask: Tensor | None) -> tuple[Reading, ...]:
        """Return what to read in the forward pass; ``mask`` ``(B, T)``, if any, marks the positions that count."""
        return ()

    def values(self, forward: Pass) -> Tensor:
        """Return the block ``(B, ...)`` from what a forward pass has read."""
        raise NotImplementedError(f"the block {self.name!r} must define values")
