"""The context in which a checkpoint inside a model computes again, in the backward pass of a recorded call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fastgrad.engine import sharded
from fastgrad.engine.mode import PerSample
from fastgrad.engine.modules import replaced, uncompiled
from fastgrad.engine.outputs import likely_join
from fastgrad.engine.recompute import Inside
from fastgrad.engine.writes import Entry, Snapshot, entries, mapped
from fastgrad.layers.call import Call


def context(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]], objects: Iterable[object], is_sharded: bool
) -> Inside:
    """Return what makes the context: the one of the forward pass, in which samples leave rows in attributes.

    ``objects`` among the inputs may hold tensors, too.
    """

    @contextlib.contextmanager
    def inside(call: Call) -> Iterator[None]:
        def rows(_: Entry, value: Any) -> Any:
            return likely_join(call.physical(value)) if call.is_batched(value) else value

        before = Snapshot(modules, objects, (), sharded=is_sharded)
        mode = PerSample(call, None, {}, inside)
        shards = sharded.hooks_below(modules, call, mode.know) if is_sharded else contextlib.nullcontext()
        try:
            with uncompiled(module for _, module in modules), replaced(model, call), shards, mode:
                yield
        finally:
            for place, value in before.changes().items():
                if any(call.is_batched(t) for _, t in entries(place, value, Tensor)):
                    before.write(place, mapped(place, value, rows))

    return inside
