"""Which implementation the layer operators take, for the rules that run inside a backward pass."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_impl: contextvars.ContextVar[str] = contextvars.ContextVar("fastgrad_layers_impl", default="auto")


def implementation() -> str:
    """The ``impl`` a rule hands to the operators it calls."""
    return _impl.get()


@contextlib.contextmanager
def using(impl: str) -> Iterator[None]:
    """Let rules take ``impl`` inside; set where they run, since a device's backward pass has threads of its own."""
    token = _impl.set(impl)
    try:
        yield
    finally:
        _impl.reset(token)
