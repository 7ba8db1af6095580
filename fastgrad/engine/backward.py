"""One backward pass through recorded calls: what each use of a parameter adds to each sample's gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad.engine.recorded import Alone, Recorded
from fastgrad.engine.turns import replacing
from fastgrad.layers.call import COPIES, Use
from fastgrad.layers.formula import Formula, Tensors
from fastgrad.layers.probe import visiting
from fastgrad.losses import compute_dtype


@dataclass(frozen=True)
class Share:
    """One use's part in the gradients of a parameter, for the samples ``rows``; see `fastgrad.layers.formula`."""

    rows: list[int]
    formula: Formula
    slot: int
    saved: Tensors
    gradients: Tensors

    def positions(self) -> int:
        """Return T if the gradients are sums of T products of vectors, or else 0."""
        return self.formula.positions(self.saved, self.gradients, self.slot)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return these vectors."""
        return self.formula.factors(self.saved, self.gradients, self.slot)

    def part(self, at: slice) -> Tensor:
        """Return a part of all gradients."""
        return self.formula.part(self.saved, self.gradients, self.slot, at)


#: Called with the number of a use, what its formula saved, and the gradients at its outputs.
See = Callable[[int, Tensors, Tensors], None]


class Backward:
    """The uses of ``wanted`` parameters, by their ids, in recorded calls that have the same number of samples."""

    def __init__(self, calls: Iterable[Recorded], wanted: Mapping[int, Tensor]) -> None:
        self.calls, self.wanted = list(calls), wanted
        self.samples = self.calls[0].samples if self.calls else 0
        self.uses: list[tuple[list[int], Use]] = []
        self.alone: list[tuple[int, Alone]] = []
        counts: dict[int, int] = {}
        for recorded in self.calls:
            own: dict[int, int] = {}
            for index, part in recorded.parts:
                rows = list(range(recorded.samples)) if index is None else index.tolist()
                if isinstance(part, Alone):
                    self.alone.append((rows[0], part))
                    own |= {key: 1 for key in wanted if key not in own}
                    continue
                self.uses += [(rows, use) for use in part.uses if any(key in wanted for key in use.keys)]
                # Samples of another group have uses of their own.
                own |= {key: max(count, own.get(key, 0)) for key, count in part.counts.items()}
            for key, count in own.items():
                counts[key] = counts.get(key, 0) + count
        #: Parameters of which a sample may have several uses.
        self.several = {key for key, count in counts.items() if count > 1}

    def back(
        self, see: See, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, keep: bool
    ) -> list[tuple[int, Share]]:
        """Go back once, and call ``see`` at each use; return the shares of samples that ran alone, by parameter."""
        inputs = [use.probe for _, use in self.uses] + [out for _, part in self.alone for out in part.outputs]
        if not inputs:
            return []
        with visiting({id(use.probe): functools.partial(see, n) for n, (_, use) in enumerate(self.uses)}):
            found = torch.autograd.grad(outputs, inputs, gradients, retain_graph=keep, allow_unused=True)
        at, shares = iter(found[len(self.uses) :]), []
        for row, part in self.alone:
            own = self._of_sample(part, [next(at) for _ in part.outputs])
            shares += [(key, Share([row], COPIES, 0, (), [value.unsqueeze(0)])) for key, value in own.items()]
        return shares

    def shares(self, n: int, saved: Tensors, gradients: Tensors) -> Iterator[tuple[int, Share]]:
        """Yield what use number n adds to each wanted parameter."""
        rows, use = self.uses[n]
        for slot, key in zip(use.slots, use.keys, strict=True):
            if key in self.wanted:
                yield key, Share(rows, use.formula, slot, saved, gradients)

    def _of_sample(self, part: Alone, gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
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
        with replacing() if part.thawed else contextlib.nullcontext(), part.swapped():
            own = torch.autograd.grad(outputs, list(leaves.values()), at, allow_unused=True, retain_graph=True)
        return {
            key: g.to_dense().to(compute_dtype(g.dtype)) for key, g in zip(leaves, own, strict=True) if g is not None
        }
