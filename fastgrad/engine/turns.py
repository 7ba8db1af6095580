"""Threads that read a model's tables of parameters and buffers, or replace what they hold for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_change = threading.Condition()
_readers = 0
#: The thread that replaces, or 0.
_replacing = 0


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Keep other threads from replacing what tables hold; any number of threads may read, and the one that replaces."""
    global _readers
    if _replacing == threading.get_ident():
        yield
        return
    with _change:
        _change.wait_for(lambda: not _replacing)
        _readers += 1
    try:
        yield
    finally:
        with _change:
            _readers -= 1
            _change.notify_all()


@contextlib.contextmanager
def replacing() -> Iterator[None]:
    """Wait until no thread reads, and keep others from it."""
    global _replacing
    with _change:
        _change.wait_for(lambda: not (_replacing or _readers))
        _replacing = threading.get_ident()
    try:
        yield
    finally:
        with _change:
            _replacing = 0
            _change.notify_all()
