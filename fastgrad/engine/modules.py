"""Calls of a model's modules that go another way in this thread: recorded ones, ones with a rule, uncompiled ones."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fastgrad._torch import original, without_modes
from fastgrad.layers.call import Call, Refused
from fastgrad.layers.registry import MODULES, OfModule, rule_of

#: Called with the module, what it would call, and the inputs.
Way = Callable[[nn.Module, Callable[..., Any], Any, Any], Any]


class Redirect:
    """A callable in the place of an attribute of a module that is called, such as ``forward``.

    It goes through ``ways``, the latest first, each of which is counted. A module has one for as long as it lives,
    because torch.compile compiles anew what calls another one. Out of its place, it does not keep the module alive.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        # At the interpreter's end, the names of this file may be gone before the module is.
        key, forget = (id(module), name), _redirects.pop
        self.living, self._name = weakref.ref(module, lambda _: forget(key, None)), name
        self._module: nn.Module | None = None
        self._own: Any = None
        self._forward: Callable[..., Any] | None = None
        self.ways: dict[Way, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what the ways make of the module's own."""
        module, forward = self._module, self._forward
        if module is None or forward is None:  # another thread has put it back since it was looked up
            return getattr(self.living(), self._name)(*args, **kwargs)
        forward = functools.partial(forward, module)
        for way in tuple(self.ways):
            forward = functools.partial(_through, way, module, forward)
        return forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Give copies and pickles of the module its own attribute, because nothing would restore it there."""
        return (getattr, (self.living(), self._name)) if self._own is None else (functools.partial, (self._own,))

    def put(self, module: nn.Module) -> None:
        """Take the place of the attribute."""
        self._own, forward = module.__dict__.get(self._name), getattr(module, self._name)
        # PyTorch 2.8 compiles anew for another bound method, so its function is kept.
        bound = getattr(forward, "__self__", None) is module
        self._module, self._forward = module, forward.__func__ if bound else functools.partial(_without, forward)
        module.__dict__[self._name] = self

    def put_back(self) -> None:
        """Restore the module's own attribute."""
        module = self._module
        assert module is not None
        if self._own is None:
            module.__dict__.pop(self._name, None)
        else:
            module.__dict__[self._name] = self._own
        self._module = self._own = self._forward = None


def _without(forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _through(way: Way, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return way(module, forward, args, kwargs)


# By the id of a module and the attribute, for all threads, whether in place or not.
_redirects: dict[tuple[int, str], Redirect] = {}
_lock = threading.Lock()


def redirect(modules: Iterable[nn.Module], way: Way, name: str = "forward") -> None:
    """Have calls of these modules go ``way``, in every thread, until `put_back` was called as often."""
    with _lock:
        for module in modules:
            key = id(module), name
            found = _redirects.get(key)
            if found is None or found.living() is not module:
                found = _redirects[key] = Redirect(module, name)
            if not found.ways:
                found.put(module)
            found.ways[way] = found.ways.get(way, 0) + 1


def put_back(modules: Iterable[nn.Module], way: Way, name: str = "forward") -> None:
    """Undo one `redirect`."""
    with _lock:
        for module in modules:
            found = _redirects[id(module), name]
            found.ways[way] -= 1
            if not found.ways[way]:
                del found.ways[way]
            if not found.ways:
                found.put_back()


class _Now(threading.local):
    """What this thread's call is, and whether compiled modules run as they are written."""

    call: Call | None = None
    plainly = 0


_now = _Now()


@contextlib.contextmanager
def uncompiled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run compiled modules as they are written inside, in this thread: compiled code hides functions from modes."""
    inner, whole = [], []
    for module in modules:
        if module.__dict__.get("_compiled_call_impl") is not None:
            inner.append(module)
        elif original(module) is not module:
            whole.append(module)
    redirect(inner, _plain_call, "_compiled_call_impl")
    redirect(whole, _plain_call)
    _now.plainly += 1
    try:
        yield
    finally:
        _now.plainly -= 1
        put_back(whole, _plain_call)
        put_back(inner, _plain_call, "_compiled_call_impl")


def _plain_call(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if not _now.plainly:
        return forward(*args, **kwargs)
    inner = original(module)
    return module._call_impl(*args, **kwargs) if inner is module else inner(*args, **kwargs)


@contextlib.contextmanager
def replaced(model: nn.Module, call: Call) -> Iterator[None]:
    """Run modules with a registered rule on the whole batch of ``call``, in this thread."""
    found = [module for module in model.modules() if rule_of(module) is not None] if MODULES else []
    before, _now.call = _now.call, call
    redirect(found, _by_rule)
    try:
        yield
    finally:
        put_back(found, _by_rule)
        _now.call = before


def _by_rule(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    call, rule = _now.call, rule_of(module)
    if call is None or rule is None or kwargs or len(args) != 1 or not call.is_batched(args[0]):
        return forward(*args, **kwargs)
    formula = OfModule(module, rule)
    if not any(map(call.owns, formula.weights)):
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
