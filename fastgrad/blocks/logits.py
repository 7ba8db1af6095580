"""The network's own answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastgrad.blocks.block import Block
from fastgrad.blocks.forward import Pass
from fastgrad.scores.one_class import energy, margin


class Logits(Block):
    """Logits ``(B, N)``. The challenge classifier sees the ten highest, so that no order of classes counts."""

    name = "logits"
    alarm = "class scores unusually weak, strong or close together"
    shapes = "(B, N)"
    scores = (energy, margin)
    classified: ClassVar[Mapping[str, Any]] = {"top": 10}

    def values(self, forward: Pass) -> Tensor:
        return forward.logits
