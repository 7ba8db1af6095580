"""Norms of small layers that are alike, computed in one call once the backward pass has been through them.

For a layer of little work, as those of a densely connected network, a call costs more than its arithmetic. Layers that
a rule tells apart by their tensors alone then lie side by side in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

#: Bytes of a layer's input and output gradient up to which it waits for others.
SMALL = 512 << 10
#: Bytes that may wait. A backward pass would have freed them.
HELD = 16 << 20


class Waiting(NamedTuple):
    """Norms of one layer that may be computed with those of others.

    Attributes:
        key: Equal for layers whose inputs and gradients may be joined along the batch.
        function: ``(input, output gradient) -> (B, m)``, for each sample by itself.
        a: Input, batch in dimension 0.
        g: Output gradient, likewise.
    """

    key: Hashable
    function: Callable[[Tensor, Tensor], Tensor]
    a: Tensor
    g: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of both tensors."""
        return self.a.nbytes + self.g.nbytes


class Together:
    """The waiting norms of one backward pass, by probe."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, list[tuple[int, Waiting]]] = {}
        self._found: dict[int, Tensor] = {}
        self._held = 0

    def add(self, probe: int, waiting: Waiting) -> None:
        """Take up the norms that are the gradient of the probe with this id."""
        self._groups.setdefault(waiting.key, []).append((probe, waiting))
        self._held += waiting.bytes
        if self._held > HELD:
            self._compute()

    def found(self) -> dict[int, Tensor]:
        """``(B, m)`` for each probe that waited."""
        self._compute()
        return self._found

    def _compute(self) -> None:
        while self._groups:
            _, group = self._groups.popitem()
            first = group[0][1]
            a, g = ([w.a for _, w in group], [w.g for _, w in group])
            joined = (first.a, first.g) if len(group) == 1 else (torch.cat(a), torch.cat(g))
            with torch.autocast(first.g.device.type, enabled=False):
                norms = first.function(*joined)
            parts = norms.split(len(first.a))
            self._found.update((probe, part) for (probe, _), part in zip(group, parts, strict=True))
        self._held = 0
