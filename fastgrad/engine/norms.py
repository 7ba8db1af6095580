"""Squared norms of each sample's gradients, from outputs that recorded calls lead to."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastgrad._torch import pytree, vmap
from fastgrad.engine.backward import Backward, Share
from fastgrad.engine.graph import batched_backward, nodes
from fastgrad.engine.products import ParameterUses
from fastgrad.engine.recorded import Recorded
from fastgrad.layers.formula import Tensors, sqnorm
from fastgrad.layers.linear import STRAIGHT, Table, sum_sqnorm
from fastgrad.losses import compute_dtype
from fastgrad.ops.dispatch import computing_with, implementation

#: By the number of a use: norms by parameters with a single use, and output gradients if one has several.
Seen = dict[int, tuple[dict[int, Tensor], list[Tensor]]]


def squared_norms(
    calls: Iterable[Recorded], outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None,
    wanted: Mapping[int, Tensor], *, batched: bool = False, keep: bool = False,
) -> dict[int, Tensor]:  # fmt: skip
    """Return squared norms ``(B,)`` by parameter, of those that outputs depend on; ``(S, B)`` for batched gradients.

    Arguments are as in `torch.autograd.grad`; ``keep`` keeps the graph for another call. All calls have B samples.
    """
    return _Norms(calls, wanted).run(outputs, gradients, batched, keep)


class _Norms(Backward):
    def __init__(self, calls: Iterable[Recorded], wanted: Mapping[int, Tensor]) -> None:
        super().__init__(calls, wanted)
        # Backward passes on a GPU run in other threads, where the variable has its default.
        self._impl = implementation.get()

    def run(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, batched: bool, keep: bool
    ) -> dict[int, Tensor]:
        if not batched:
            return self._one(outputs, gradients, keep)
        assert gradients is not None
        count = gradients[0].shape[0]
        # A checkpoint around a call computes it again, and not all functions take several gradients at once.
        together = all(recorded.batched_backward and not recorded.hooked for recorded in self.calls)
        if count > 1 and together and not self.alone and batched_backward(map(type, nodes(outputs))):
            try:
                return self._together(outputs, gradients, keep=True)
            except RuntimeError:
                pass  # some backward passes do not take several gradients, such as batch norm's of two dtypes
        each = [self._one(outputs, [g[i] for g in gradients], keep or i < count - 1) for i in range(count)]
        return {key: torch.stack([found[key] for found in each]) for key in each[0]} if each else {}

    def _one(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, keep: bool) -> dict[int, Tensor]:
        seen: Seen = {}
        saved: dict[int, Tensors] = {}
        alone = self.back(functools.partial(self._see, seen, saved), outputs, gradients, keep)
        return self._joined(seen, saved, alone)

    def _together(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], keep: bool) -> dict[int, Tensor]:
        """Send several gradients back in one pass."""
        saved: dict[int, Tensors] = {}

        def back(*grads: Tensor) -> Seen:
            seen: Seen = {}
            self.back(functools.partial(self._see, seen, saved), outputs, list(grads), keep)
            return seen

        leaves, spec = pytree.tree_flatten(vmap(back)(*gradients) if self.uses else {})
        each = zip(*(leaf.unbind() for leaf in leaves), strict=True)
        rows = [self._joined(pytree.tree_unflatten(own, spec), saved, []) for own in each]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} if rows else {}

    def _see(self, seen: Seen, saved: dict[int, Tensors], n: int, own: Tensors, gradients: Tensors) -> None:
        use = self.uses[n][1]
        pairs = [(slot, key) for slot, key in zip(use.slots, use.keys, strict=True) if key in self.wanted]
        single = {key: slot for slot, key in pairs if key not in self.several}
        norms: list[Tensor] = []
        if single:
            with computing_with(self._impl):
                norms = use.formula.sqnorms(own, gradients, list(single.values()))
        summed = len(single) < len(pairs)
        seen[n] = dict(zip(single, norms, strict=True)), list(gradients) if summed else []
        if summed:
            saved[n] = own

    def _joined(
        self, seen: Seen, saved: Mapping[int, Tensors], alone: Iterable[tuple[int, Share]]
    ) -> dict[int, Tensor]:
        """Put the norms of all parts of the batch together."""
        result: dict[int, Tensor] = {}
        shares: dict[int, list[Share]] = {}
        for n, (norms, gradients) in sorted(seen.items()):
            for key, found in norms.items():
                self._put(result, key, self.uses[n][0], found)
            for key, share in self.shares(n, saved[n], gradients) if n in saved else ():
                if key in self.several:
                    shares.setdefault(key, []).append(share)
        for key, share in alone:
            shares.setdefault(key, []).append(share)
        for key, each in shares.items():
            self._put(result, key, *norms_of_uses(self.wanted[key].shape, self.samples, each))
        return result

    def _put(self, result: dict[int, Tensor], key: int, rows: list[int], norms: Tensor) -> None:
        p = self.wanted[key]
        norms = norms.to(device=p.device, dtype=compute_dtype(p.dtype, norms.dtype))
        if len(rows) == self.samples and rows == list(range(self.samples)):
            result[key] = norms
            return
        if key not in result:
            result[key] = norms.new_zeros(self.samples)
        result[key][torch.tensor(rows, device=norms.device)] = norms


def norms_of_uses(shape: Sequence[int], samples: int, shares: list[Share]) -> tuple[list[int], Tensor]:
    """Return samples, and the squared norms of the sums of their gradients of a parameter."""
    rows = shares[0].rows
    if len(shares) == 1:
        (share,) = shares
        return rows, share.formula.sqnorms(share.saved, share.gradients, [share.slot])[0]
    products = [s.factors()[::-1] for s in shares if s.formula is STRAIGHT and not s.slot]
    tables = [s.factors() for s in shares if isinstance(s.formula, Table)]
    if len(products) + len(tables) == len(shares) and all(share.rows == rows for share in shares):
        return rows, sum_sqnorm(products, tables)
    side = ParameterUses(shape, samples, shares)
    norms = [sqnorm(side.part(at)) for at in side.parts(samples)]
    return list(range(samples)), torch.stack(norms).sum(0)
