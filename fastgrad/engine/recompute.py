"""Checkpoints inside a model: what the backward pass computes again enters the samples' level of ``vmap`` again."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import (
    StopRecomputation,
    arguments_of,
    checkpoint_of,
    entered,
    functorch,
    hooks_above,
    is_saved,
    lowered,
)
from fastgrad.engine.graph import no_view
from fastgrad.engine.turns import reading
from fastgrad.layers.call import CHECKPOINT, Call, Refused

#: Returns the context in which the model runs on the samples of a call.
Inside = Callable[[Call], contextlib.AbstractContextManager[Any]]


class Recompute:
    """What a checkpoint calls in the backward pass in place of its own ``function``.

    Rules and taps are applied as in the forward pass, so that the same tensors are saved. The uses of parameters that
    the backward pass meets are those of the forward pass; new ones are forgotten. ``given`` are the arguments.
    """

    def __init__(
        self, function: Callable[..., Any], call: Call, given: Sequence[Any], inside: Inside, *, nested: bool
    ) -> None:
        self.function, self._inside = function, inside
        # Not the call itself, whose formulas and copies made later would live as long as the graph.
        self._call = call.again()
        batches = [x for x in map(call.physical, given) if isinstance(x, Tensor)]
        # Arguments of a checkpoint inside another are computed again too, so that they cannot be modified.
        self._given = [(None if nested else x._version, x.requires_grad) for x in batches]

    def __call__(self, *args: Any) -> None:
        """Compute again, until all that is needed is there."""
        call = self._call.again()
        with reading(), entered(call.level, call.samples):
            given = iter(self._given)
            own = [_alive(x, call, *next(given)) if isinstance(x, Tensor) else x for x in args]
            # Stopped here, because the traceback would keep tensors.
            with contextlib.suppress(StopRecomputation), self._inside(call):
                self.function(*own)


def _alive(x: Tensor, call: Call, version: int | None, requires_grad: bool) -> Tensor:
    """Return an argument as it was; another checkpoint, which this one is inside, forgets that it has a graph."""
    batch = call.physical(x)
    if version is not None and batch._version != version:
        raise RuntimeError(
            "an argument of a checkpoint was modified by an inplace operation after the checkpoint was called"
        )
    if batch is x or batch.requires_grad == requires_grad:
        return x
    with lowered():
        batch = no_view(batch.detach().requires_grad_())
    alive: Tensor = call.wrapped(batch)
    return alive


def follow(call: Call, inside: Inside | None) -> None:
    """Have the checkpoints that are under way compute again on the samples of ``call``; Refused if they cannot."""
    frames = [checkpoint_of(hooks) for hooks in hooks_above(call.hooks)]
    if inside is None or not all(frames) or functorch.maybe_current_level() != call.level:
        raise Refused(CHECKPOINT)
    for frame in frames:
        if not isinstance(frame.recompute_fn, Recompute):
            given = arguments_of(frame)
            if given is None:
                raise Refused(CHECKPOINT)
            nested = call.hooks is not None or frame is not frames[0]
            frame.recompute_fn = Recompute(frame.recompute_fn, call, given, inside, nested=nested)
            call.checkpoints.append(weakref.ref(frame))


def kept_elsewhere(tensors: list[Tensor], checkpoints: Iterable[weakref.ref[Any]]) -> bool:
    """Whether something else than the graph and checkpoints keeps one of these tensors."""
    frames = [frame for ref in checkpoints if (frame := ref()) is not None]
    own = _references([frame.recompute_fn.function for frame in frames])
    free, saved = torch.zeros((), device="cpu"), torch.zeros((), device="cpu", requires_grad=True)
    with torch.enable_grad():
        graph = saved * saved
    # A tensor is in the list, these have a name; each is in the tuple as well.
    *counts, none, by_graph = (sys.getrefcount(t) for t in (*tensors, free, saved))
    del graph
    return any(
        count - own[id(t)] > (by_graph if is_saved(t) else none) for t, count in zip(tensors, counts, strict=True)
    )


def _references(functions: list[Any]) -> Counter[int]:
    """Count, by id, the references to objects from functions, and from what nothing but these functions refers to."""
    found: Counter[int] = Counter()
    held: dict[int, Any] = {}

    def others(thing: Any) -> int:
        """Count a reference, and return how many there are beside those that were found."""
        found[id(thing)] += 1
        held[id(thing)] = thing
        return sys.getrefcount(thing) - found[id(thing)]

    waiting: list[Any] = [object()]
    none = others(waiting[-1]) + 1  # one reference was counted, and there is none
    waiting += [thing for function in functions for thing in _contents(function)]
    while waiting:
        # What waits a second time has one reference more, until it comes for the last time.
        own = others(waiting[-1]) == none
        thing = waiting.pop()
        waiting += _contents(thing) if own else []
        del thing
    return found


def _contents(holder: Any) -> list[Any]:
    """Return what functions close over, and what containers of their arguments hold."""
    if isinstance(holder, types.FunctionType):
        return [holder.__closure__, holder.__defaults__, holder.__kwdefaults__]
    if isinstance(holder, types.CellType):
        try:
            return [holder.cell_contents]
        except ValueError:  # it is empty
            return []
    if isinstance(holder, functools.partial):
        return [holder.func, holder.args, holder.keywords]
    if isinstance(holder, (tuple, list)):
        return list(holder)
    return list(holder.values()) if isinstance(holder, dict) else []
