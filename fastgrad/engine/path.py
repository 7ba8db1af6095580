"""Whether a forward pass takes the path that its plan is for.

A plan says in which call of which module a parameter is used. Outside of that call the private copy holds a sentinel in
the parameter's place, and parameters that the plan takes for unused have a sentinel throughout. Whatever a model does
with a sentinel that autograd would follow is off plan. Inside the call, whose rule or replay knows every use, the copy
holds the parameter, so that a pass that keeps to its plan never comes upon a sentinel.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import pytree, without_subclasses
from fastgrad.engine.run import Run
from fastgrad.engine.shadow import Shadow, attach

# Functions that broadcast a parameter over the batch, by name without underscores.
_BROADCASTING = frozenset(
    {"add", "iadd", "radd", "sub", "isub", "rsub", "mul", "imul", "rmul", "div", "expand"}
)


class _Running(threading.local):
    """The forward passes under way in a thread, outermost first: what their sentinels stand for, by id."""

    def __init__(self) -> None:
        self.stack: list[tuple[Run, dict[int, Tensor]]] = []


_running = _Running()


def broadcasts(function: Any, result: Any, samples: Any) -> bool:
    """Whether a call of ``function`` with this result broadcasts its arguments over a batch of ``samples``."""
    return (
        isinstance(result, Tensor)
        and getattr(function, "__name__", "").strip("_") in _BROADCASTING
        and result.shape[:1] == (samples,)
    )


class Sentinel(Tensor):
    """Stands in for a parameter where its plan expects no use."""

    #: Name of the parameter within the model.
    of_parameter: str
    #: Where a gradient of it would arrive.
    edge: Any

    @staticmethod
    def of(parameter: Tensor, name: str) -> Sentinel:
        """A sentinel of the shape of ``parameter``; it takes no memory."""
        empty = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        learns = parameter.is_floating_point() or parameter.is_complex()
        made = empty.as_subclass(Sentinel)
        made.of_parameter = name
        with without_subclasses(), torch.enable_grad():
            made.requires_grad_(learns)
            made.edge = torch.autograd.graph.get_gradient_edge(made) if learns else None
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """Say what it stands for."""
        return f"Sentinel({self.of_parameter!r})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on the parameters; OffPlanError if autograd would follow it."""
        used: dict[str, Run] = {}

        def value(sentinel: Sentinel) -> Tensor:
            for run, parameters in reversed(_running.stack):
                if id(sentinel) in parameters:
                    used[sentinel.of_parameter] = run
                    tensor = parameters[id(sentinel)].detach()
                    return nn.Parameter(tensor) if tensor.is_floating_point() else tensor
            raise ValueError(
                f"model must use {sentinel.of_parameter!r} in every call as in the first; it handed it to a function "
                "of autograd, or kept it beyond the forward pass, where it was not used before"
            )

        args, kwargs = pytree.tree_map_only(Sentinel, value, (args, kwargs or {}))
        with without_subclasses():
            result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(result)):
            run = next(iter(used.values()))
            run.leave_plan(tuple(used), f"uses {next(iter(used))!r} where it was not used before")
        return result


class Copies(Tensor):
    """One copy of a parameter for each sample, which the model may broadcast and use in no other way."""

    #: The forward pass, the parameter's name, and the number of dimensions of what it is broadcast to.
    use: tuple[Run, str, int]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on ordinary tensors; OffPlanError unless it broadcasts the parameter or gives no tensor."""
        with without_subclasses():
            result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Copies):
                run, name, rank = leaf.use
                if run.closed or not any(isinstance(r, Tensor) for r in pytree.tree_leaves(result)):
                    continue
                if not broadcasts(func, result, run.samples) or result.dim() != rank:
                    run.leave_plan((name,), f"uses {name!r} in another way than before")
        return result


@dataclass(frozen=True)
class _Swap:
    """A parameter of a copy and its sentinel.

    Attributes:
        places: Tables and keys.
        parameter: What the copy holds where the plan expects a use.
        sentinel: What it holds elsewhere.
        shadow: The copy, where its plain attributes hold the parameter as well.
        key: Id of the user's parameter.
    """

    places: Sequence[tuple[dict[str, Any], str]]
    parameter: Tensor
    sentinel: Tensor
    shadow: Shadow | None
    key: int

    def put(self, value: Tensor, instead_of: Tensor) -> None:
        """Let the copy hold ``value`` where it holds ``instead_of``; nothing that somebody else put there changes."""
        for table, name in self.places:
            if table[name] is instead_of:
                table[name] = value
        if self.shadow is not None:
            self.shadow.hold(self.key, value)


def _enter(swaps: Sequence[_Swap], *_: Any) -> None:
    for swap in swaps:
        swap.put(swap.parameter, swap.sentinel)


def _leave(run: Run, swaps: Sequence[_Swap], *_: Any) -> None:
    if not run.closed:
        for swap in swaps:
            swap.put(swap.sentinel, swap.parameter)


@contextlib.contextmanager
def watched(
    run: Run, shadow: Shadow, calls: Mapping[str, str | None], sentinels: Mapping[str, tuple[int, Sentinel]]
) -> Iterator[None]:
    """While it lasts, a forward pass of ``shadow`` raises OffPlanError where it uses parameters in another way.

    Args:
        run: The pass.
        shadow: The copy that runs.
        calls: By name, the module in whose call a parameter is used; None for one that is not used.
        sentinels: By name, the id of the user's parameter and what stands in for it.
    """
    groups: dict[str | None, list[_Swap]] = {}
    parameters: dict[int, Tensor] = {}
    for name, path in calls.items():
        key, sentinel = sentinels[name]
        places, parameter, held = shadow.places(key)
        parameters[id(sentinel)] = parameter
        groups.setdefault(path, []).append(_Swap(places, parameter, sentinel, shadow if held else None, key))
        if sentinel.edge is not None:
            run.unexpected.append((name, sentinel.edge))
    everything = [swap for swaps in groups.values() for swap in swaps]
    for path, swaps in groups.items():
        if path is not None:
            module = shadow.submodule(path)
            attach(module, functools.partial(_leave, run, swaps))
            attach(module, functools.partial(_enter, swaps), before=True)
    for swap in everything:
        swap.put(swap.sentinel, swap.parameter)
    _running.stack.append((run, parameters))
    try:
        yield
    finally:
        _running.stack.pop()
        run.closed = True
        # The backward pass may look at them, and a checkpoint compute a part again.
        _enter(everything)
