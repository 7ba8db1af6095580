"""Modules with a registered rule: their ``forward`` runs on the whole batch, and the rule gives norms."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fastgrad._torch import without_modes
from fastgrad.layers.call import Call, Refused
from fastgrad.layers.registry import MODULES, ModuleRule, OfModule, rule_of


class Redirect:
    """A callable that replaces ``forward`` of a user's module.

    ``call`` gets the module, its own ``forward`` and the inputs.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._own = module.__dict__.get("forward")
        self._forward = module.forward
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as ``forward`` of the module."""
        return self._call(self._module, self._forward, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Give copies and pickles of the module its own ``forward``, because nothing would restore it there."""
        return (getattr, (self._module, "forward")) if self._own is None else (functools.partial, (self._own,))

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the earlier ``forward`` in ``state``, a module's ``__dict__``."""
        if self._own is None:
            state.pop("forward", None)
        else:
            state["forward"] = self._own


_calls = threading.local()


@contextlib.contextmanager
def replaced(model: nn.Module, call: Call) -> Iterator[None]:
    """Run modules with a registered rule on the whole batch of ``call``, in this thread."""
    if not MODULES:
        yield
        return
    found = [(module, rule) for module in model.modules() if (rule := rule_of(module)) is not None]
    redirects = []
    before, _calls.now = getattr(_calls, "now", None), call
    try:
        for module, rule in found:
            redirects.append((module, Redirect(module, functools.partial(_run, rule))))
            module.__dict__["forward"] = redirects[-1][1]
        yield
    finally:
        _calls.now = before
        for module, redirect in reversed(redirects):
            redirect.restore(module.__dict__)


def _run(rule: ModuleRule, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    call: Call | None = getattr(_calls, "now", None)
    formula = OfModule(module, rule)
    if (
        call is None
        or kwargs
        or len(args) != 1
        or not call.is_batched(args[0])
        or not any(map(call.owns, formula.weights))
    ):
        return forward(*args, **kwargs)
    if args[0].shape[0] != 1:
        raise Refused("a module with a registered rule gets other rows than one for each sample")

    def on_batch() -> Tensor:
        x = call.physical(args[0]).flatten(0, 1)
        with without_modes():  # which would take the batch for one sample
            y = forward(x)
        out = call.tapped([y], [x], formula.weights, formula, in_place=False)[0]
        return out.unsqueeze(1)

    return call.on_batch(on_batch)
