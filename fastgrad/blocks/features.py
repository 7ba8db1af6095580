"""The record that a network yields, that a detector is fitted on, and from which it can answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrad import checks


@dataclass(frozen=True)
class Features:
    """Logits and blocks of n inputs, on the CPU, and what is known of each; rows are inputs.

    Attributes:
        logits: ``(n, N)``; N may be 0 for a detector alone.
        blocks: ``(n, ...)`` by name.
        kinds: n names of kinds of challenge; empty for clean inputs.
        sources: ``(n,)``, int64. Inputs of one source, as a clean input and its challenges, have the same number and
            stay on one side of each fit; negative ones are sources of their own.
        labels: ``(n,)``, int64, class indices; -1 for none. A challenge has the label of its clean input.
        held_out: ``(n,)``, bool: clean inputs on which nothing is fitted, so that they calibrate.
    """

    logits: Tensor
    blocks: Mapping[str, Tensor]
    kinds: Sequence[str]
    sources: Tensor
    labels: Tensor
    held_out: Tensor

    @classmethod
    def of(
        cls, logits: Tensor, blocks: Mapping[str, Tensor], *, kinds: Sequence[str] | None = None,
        sources: Tensor | None = None, labels: Tensor | None = None, held_out: Tensor | None = None,
    ) -> Features:  # fmt: skip
        """Return features on the CPU; by default of clean inputs without labels, each a source of its own.

        Raises:
            ValueError: Lengths differ.
        """
        n = len(logits)
        none = torch.full((n,), -1, dtype=torch.int64, device="cpu")
        columns = {
            "sources": none if sources is None else sources, "labels": none if labels is None else labels,
            "held_out": none > 0 if held_out is None else held_out,
        }  # fmt: skip
        columns = {name: torch.as_tensor(value, device="cpu") for name, value in columns.items()}
        kinds = [""] * n if kinds is None else list(kinds)
        every: dict[str, Any] = {
            "kinds": kinds,
            **columns,
            **{f"blocks[{name!r}]": value for name, value in blocks.items()},
        }
        for name, rows in every.items():
            if len(rows) != n:
                raise ValueError(f"{name} must have a row for each of {n} inputs, as logits have; it had {len(rows)}")
        return cls(logits.cpu(), {name: value.cpu() for name, value in blocks.items()}, kinds, **columns)

    def __len__(self) -> int:
        return len(self.logits)

    def at(self, rows: Tensor) -> Features:
        """Return the inputs at ``rows``, indices or a mask."""
        return Features(
            self.logits[rows], {name: value[rows] for name, value in self.blocks.items()},
            np.array(self.kinds, object)[rows.numpy()].tolist(), self.sources[rows], self.labels[rows],
            self.held_out[rows],
        )  # fmt: skip

    @classmethod
    def cat(cls, parts: Iterable[Features]) -> Features:
        """Return all inputs of several records with the same blocks, in order."""
        every = list(parts)
        columns = ("logits", "sources", "labels", "held_out")
        joined = {name: torch.cat([getattr(part, name) for part in every]) for name in columns}
        blocks = {name: torch.cat([part.blocks[name] for part in every]) for name in every[0].blocks}
        return cls(blocks=blocks, kinds=[kind for part in every for kind in part.kinds], **joined)

    def only(self, names: Iterable[str]) -> Features:
        """Return the same inputs with these blocks alone; ValueError if one is missing."""
        wanted = list(names)
        if missing := [name for name in wanted if name not in self.blocks]:
            raise ValueError(f"features must have the blocks {wanted}; they had {list(self.blocks)}, without {missing}")
        return replace(self, blocks={name: self.blocks[name] for name in wanted})

    @property
    def codes(self) -> Tensor:
        """``(n,)``, int64: 0 for clean inputs, and numbers from 1 for kinds of challenge in alphabetical order."""
        numbers = {kind: i for i, kind in enumerate(["", *sorted({*self.kinds} - {""})])}
        return torch.tensor([numbers[kind] for kind in self.kinds], dtype=torch.int64, device="cpu")

    @property
    def challenging(self) -> Tensor:
        """``(n,)``, bool."""
        return self.codes > 0

    @property
    def source_numbers(self) -> Tensor:
        """``(n,)``, int64: sources numbered from 0."""
        return torch.from_numpy(checks.sources_of(self.sources.numpy(), len(self)))
