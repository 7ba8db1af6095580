"""Squared norms of each sample's gradients, from outputs that recorded runs lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastgrad._torch import vmap
from fastgrad.engine.backward import Backward, Given, Share
from fastgrad.engine.layout import agree
from fastgrad.engine.products import Side
from fastgrad.engine.structure import Recorded
from fastgrad.layers.call import Use
from fastgrad.layers.linear import STRAIGHT, Table, sum_sqnorm
from fastgrad.layers.probe import visiting
from fastgrad.layers.reduce import sqnorm
from fastgrad.losses import compute_dtype
from fastgrad.ops.dispatch import bind_contextvar, implementation


def squared_norms(
    calls: Iterable[Recorded],
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    wanted: Mapping[int, Tensor],
    *,
    batched: bool = False,
    keep: bool = False,
) -> dict[int, Tensor]:
    """Return squared norms ``(B,)`` by parameter, of those that outputs depend on; ``(S, B)`` for batched gradients.

    Arguments are as in `torch.autograd.grad`; ``keep`` keeps the graph for another call. All calls have B samples.
    """
    return _Norms(calls, wanted).run(outputs, gradients, batched, keep)


class _Norms(Backward):
    def run(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, batched: bool, keep: bool
    ) -> dict[int, Tensor]:
        if not batched:
            return self._once(outputs, gradients, keep)
        assert gradients is not None
        count = gradients[0].shape[0]
        looped = count == 1 or bool(self.alone) or any(use.formula.replays for _, use in self.uses)
        # A checkpoint around a call computes it again, and functions of the user's may not be for vmap.
        foreign = any(recorded.structure.foreign or recorded.hooked for recorded in self.calls)
        if looped or foreign:
            each = [self._once(outputs, [g[i] for g in gradients], keep or i < count - 1) for i in range(count)]
            return {key: torch.stack([found[key] for found in each]) for key in each[0]} if each else {}
        structures = [recorded.structure for recorded in self.calls]
        if all(structure.batches for structure in structures):
            return self._together(outputs, gradients, keep)
        try:
            found = self._together(outputs, gradients, keep=True)
        except RuntimeError:
            # Some backward passes of PyTorch do not take several gradients, such as batch norm's of two dtypes.
            for structure in structures:
                structure.foreign = True
            return self.run(outputs, gradients, batched, keep)
        # Where PyTorch's backward pass is wrong for several gradients (cdist), they go one by one.
        for s in (0, count - 1):
            alone = self._once(outputs, [g[s] for g in gradients], keep=True)
            right = all(agree(found[key][s], norms, torch.finfo(norms.dtype).eps) for key, norms in alone.items())
            for structure in structures:
                structure.foreign |= not right
        for structure in structures:
            structure.batches = not structure.foreign
        return found if structures[0].batches else self.run(outputs, gradients, batched, keep)

    def _once(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor] | None, keep: bool) -> dict[int, Tensor]:
        given: dict[int, Given] = {}
        found = self.back(lambda _, use: self._visit(use, given), outputs, gradients, keep)
        if not found:
            return {}
        return self._sums(found, given)

    def _together(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], keep: bool) -> dict[int, Tensor]:
        """Send several gradients back in one pass."""
        probes = [use.probe for _, use in self.uses]
        if not probes:
            return {}
        reached: list[int] = []
        kept: list[tuple[int, Sequence[Tensor], int]] = []

        def back(*grads: Tensor) -> list[Tensor]:
            given: dict[int, Given] = {}
            with visiting({id(use.probe): self._visit(use, given) for _, use in self.uses}):
                found = torch.autograd.grad(outputs, probes, list(grads), retain_graph=keep, allow_unused=True)
            result = []
            for i, g in enumerate(found):
                if g is not None:
                    reached.append(i)
                    result.append(g)
            for key, (saved, at) in given.items():
                kept.append((key, saved, len(at)))
                result += at
            return result

        values = iter(vmap(back)(*gradients))
        norms = {i: next(values) for i in reached}
        later = [(key, saved, [next(values) for _ in range(count)]) for key, saved, count in kept]
        rows = []
        for s in range(gradients[0].shape[0]):
            found = [norms[i][s] if i in norms else None for i in range(len(probes))]
            rows.append(self._sums(found, {key: (saved, [g[s] for g in at]) for key, saved, at in later}))
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def _visit(self, use: Use, given: dict[int, Given]) -> Callable[..., Tensor]:
        pairs = list(zip(use.slots, use.keys, strict=True))
        single = [slot for slot, key in pairs if key in self.wanted and key not in self.several]
        summed = any(key in self.wanted and key in self.several for _, key in pairs)

        def visit(saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
            if summed:
                given[id(use.probe)] = saved, gradients
            with bind_contextvar(implementation, use.impl):
                norms = dict(zip(single, use.formula.sqnorms(saved, gradients, single), strict=True)) if single else {}
            if len(norms) == 1 and len(pairs) == 1:
                return norms[single[0]].unsqueeze(1)
            none = use.probe.detach()[:, 0]
            return torch.stack([norms.get(slot, none).to(none) for slot in use.slots], 1)

        return visit

    def _sums(self, found: Sequence[Tensor | None], given: Mapping[int, Given]) -> dict[int, Tensor]:
        """Put the norms of all parts of the batch together."""
        result: dict[int, Tensor] = {}
        shares: dict[int, list[Share]] = {}
        for (rows, use), norms in zip(self.uses, found, strict=False):
            if norms is None:
                continue
            for column, (slot, key) in enumerate(zip(use.slots, use.keys, strict=True)):
                if key not in self.wanted:
                    continue
                if key in self.several:
                    shares.setdefault(key, []).append(Share(rows, use.formula, slot, given[id(use.probe)]))
                else:
                    self._put(result, key, rows, norms[:, column])
        for key, share in self.of_alone(found):
            shares.setdefault(key, []).append(share)
        for key, each in shares.items():
            self._put(result, key, *self._of_sum(key, each))
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

    def _of_sum(self, key: int, shares: list[Share]) -> tuple[list[int], Tensor]:
        """Return samples, and the squared norms of the sums of their gradients."""
        rows = shares[0].rows
        if len(shares) == 1:
            return rows, shares[0].sqnorms()
        products = [s.factors()[::-1] for s in shares if s.formula is STRAIGHT and not s.slot]
        tables = [s.factors() for s in shares if isinstance(s.formula, Table)]
        if len(products) + len(tables) == len(shares) and all(share.rows == rows for share in shares):
            return rows, sum_sqnorm(products, tables)
        side = Side(self.wanted[key].shape, self.samples, shares)
        norms = [sqnorm(side.part(at)) for at in side.parts(self.samples)]
        return list(range(self.samples)), torch.stack(norms).sum(0)
