"""Attacks on a running server: connections, and what the web process may take meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serve_client import Server, image

#: What the web process may take above its idle size, and how long one callback may keep the event loop.
MEMORY, PAUSE = 100.0, 0.050


def counts(short: int, long: int) -> pytest.MarkDecorator:
    """Parametrize a test with how often it does what it does."""
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.slow)], ids=["short", "long"])


@contextlib.contextmanager
def watched(served: Any, name: str) -> Iterator[None]:
    """Hold the web process to its memory and its event loop, and ask it like anybody else meanwhile."""
    server = served.server
    assert served.predict(image(), "image/png")[0] == 200
    idle = server.memory()
    server.forget()
    slowest, over = 0.0, threading.Event()

    def others() -> None:
        nonlocal slowest
        while not over.is_set():
            start = time.perf_counter()
            # No attack takes the server out of the balancer.
            assert server.request("GET", "/ready")[0] == 200
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.05)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(others)
        try:
            yield
        finally:
            over.set()
        asking.result()
    grown = server.memory("VmHWM") - idle
    processor, clock = server.pauses()
    print(
        f"{name}: {grown:.0f} MiB above idle; longest callback {1000 * processor:.0f} ms of the processor, "
        f"{1000 * clock:.0f} ms of the clock; /ready at most {1000 * slowest:.0f} ms"
    )
    assert grown <= MEMORY
    # The clock also counts what other processes take of the machine meanwhile.
    assert processor <= PAUSE
    assert served.predict(image(), "image/png")[0] == 200


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


@contextlib.contextmanager
def connections(server: Server, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(connect(server)) for _ in range(count)]
