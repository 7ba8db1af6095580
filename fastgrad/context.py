"""Context variables that have a value for the length of a block, in this thread and task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

_T = TypeVar("_T")


@contextlib.contextmanager
def setting(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Give ``variable`` a value inside."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
