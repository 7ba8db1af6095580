"""One backward pass through recorded runs, and what it shows of each sample's gradient of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastgrad.engine.structure import Alone, Recorded
from fastgrad.layers.call import COPIES, Use
from fastgrad.layers.formula import Formula
from fastgrad.layers.probe import Visit, visiting
from fastgrad.losses import compute_dtype

#: What a formula needs: saved tensors and output gradients, of all samples of a part.
Given = tuple[Sequence[Tensor], Sequence[Tensor]]


class Share:
    """One use's part in the gradients of a parameter, for the samples of a part of a batch."""

    def __init__(self, rows: list[int], formula: Formula, slot: int, given: Given) -> None:
        self.rows, self.formula, self.slot, self._given = rows, formula, slot, given

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self._given[1][0].device

    def sqnorms(self) -> Tensor:
        """Return squared norms ``(B,)`` of this share alone."""
        return self.formula.sqnorms(*self._given, [self.slot])[0]

    def positions(self) -> int:
        """Return T if the gradients are sums of T products of vectors, or else 0."""
        return self.formula.positions(*self._given, self.slot)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return these vectors, as `fastgrad.layers.formula.Formula.factors` does."""
        return self.formula.factors(*self._given, self.slot)

    def part(self, at: slice) -> Tensor:
        """Return a part of all gradients, as `fastgrad.layers.formula.Formula.part` does."""
        return self.formula.part(*self._given, self.slot, at)


class Backward:
    """What recorded calls, all of as many samples, know of the gradients of ``wanted``, parameters by their ids."""

    def __init__(self, calls: Iterable[Recorded], wanted: Mapping[int, Tensor]) -> None:
        self.calls, self.wanted = list(calls), wanted
        self.samples = self.calls[0].samples if self.calls else 0
        self.uses: list[tuple[list[int], Use]] = []
        self.alone: list[tuple[int, Alone]] = []
        counts: dict[int, int] = {}
        for recorded in self.calls:
            seen: set[int] = set()
            for index, part in recorded.parts:
                rows = list(range(recorded.samples)) if index is None else index.tolist()
                if isinstance(part, Alone):
                    self.alone.append((rows[0], part))
                    seen |= wanted.keys()
                    continue
                self.uses += [(rows, use) for use in part.uses if any(key in wanted for key in use.keys)]
                # Samples of another group have uses of their own.
                for key, count in part.counts.items():
                    if count > 1:
                        counts[key] = 2
                    seen.add(key)
            for key in seen:
                counts[key] = counts.get(key, 0) + 1
        #: Parameters of which a sample may have several uses.
        self.several = {key for key, count in counts.items() if count > 1}

    def back(
        self,
        visit: Callable[[list[int], Use], Visit],
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor] | None,
        keep: bool,
    ) -> tuple[Tensor | None, ...]:
        """Go back once. Return what visits gave for each use, then gradients at outputs of samples that ran alone."""
        inputs = [use.probe for _, use in self.uses] + [out for _, part in self.alone for out in part.outputs]
        if not inputs:
            return ()
        with visiting({id(use.probe): visit(rows, use) for rows, use in self.uses}):
            return torch.autograd.grad(outputs, inputs, gradients, retain_graph=keep, allow_unused=True)

    def of_alone(self, found: Sequence[Tensor | None]) -> Iterator[tuple[int, Share]]:
        """Yield the shares of samples that ran alone, with the ids of their parameters."""
        at = len(self.uses)
        for row, part in self.alone:
            grads = found[at : at + len(part.outputs)]
            at += len(part.outputs)
            for key, value in self._own(part, grads).items():
                yield key, Share([row], COPIES, 0, ([], [value.unsqueeze(0)]))

    def _own(self, part: Alone, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Return the gradients of a sample that ran alone."""
        pairs = [(out, g) for out, g in zip(part.outputs, gradients, strict=True) if g is not None]
        if not pairs:
            return {}
        outputs, at = zip(*pairs, strict=True)
        leaves = {key: part.thawed.get(key, p) for key, p in self.wanted.items()}
        if not all(leaf.requires_grad for leaf in leaves.values()):
            raise ValueError(
                "params must require gradients where samples run alone because of a checkpoint in forward; one does "
                "not. Call requires_grad_() before the call, or leave the checkpoint out"
            )
        with part.swapped():
            own = torch.autograd.grad(outputs, list(leaves.values()), at, allow_unused=True, retain_graph=True)
        return {
            key: g.to_dense().to(compute_dtype(g.dtype)) for key, g in zip(leaves, own, strict=True) if g is not None
        }
