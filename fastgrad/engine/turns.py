"""Threads that read a model's tables and attributes, or replace what they hold for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_change = threading.Condition()
_readers = 0
_replacing = False


class _Own(threading.local):
    """Whether this thread reads or replaces already; a call inside of a call waits for nobody."""

    busy = False


_own = _Own()


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Keep other threads from replacing what tables hold; any number of threads may read."""
    global _readers
    if _own.busy:
        yield
        return
    with _change:
        _change.wait_for(lambda: not _replacing)
        _readers += 1
    _own.busy = True
    try:
        yield
    finally:
        _own.busy = False
        with _change:
            _readers -= 1
            _change.notify_all()


@contextlib.contextmanager
def replacing() -> Iterator[None]:
    """Wait until no thread reads, and keep others from it."""
    global _replacing
    if _own.busy:
        yield
        return
    with _change:
        _change.wait_for(lambda: not (_replacing or _readers))
        _replacing = True
    _own.busy = True
    try:
        yield
    finally:
        _own.busy = False
        with _change:
            _replacing = False
            _change.notify_all()
