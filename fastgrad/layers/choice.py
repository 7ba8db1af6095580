"""Which implementation the layer operators take, for the rules that run inside a backward pass."""

from __future__ import annotations

import contextvars
from contextlib import AbstractContextManager

from fastgrad.ops.dispatch import bind_contextvar

_impl: contextvars.ContextVar[str] = contextvars.ContextVar("fastgrad_layers_impl", default="auto")


def implementation() -> str:
    """The ``impl`` a rule hands to the operators it calls."""
    return _impl.get()


def using(impl: str) -> AbstractContextManager[None]:
    """Let rules take ``impl`` inside; set where they run, since a device's backward pass has threads of its own."""
    return bind_contextvar(_impl, impl)
