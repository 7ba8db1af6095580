"""The web server: uvicorn, with limits on connections and headers, and an end that cuts no connection."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
import time
from typing import Any, cast

from fastgrad.checks import extra
from fastgrad.deploy.serve.bodies import Limits

with extra("serve"):
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

#: Bytes of a request's headers.
_HEADERS = 16 * 2**10
#: Bytes that are read at once, and so held for a connection whose request waits.
_READ = 2**14
#: Seconds for which connections that are new, or were in use, may still send a request during shutdown.
_LEAST, _MOST = 1.0, 5.0
#: Options of the GNU C library's ``mallopt``: blocks above the first size come from the system and go back when they
#: are freed; what is free at the heap's end goes back above the second.
_HEAP = {-3: 2**20, -1: 2**24}
#: Connections accepted at once, and files that a process has open beside all connections.
_AT_ONCE, _FILES = 2048, 128
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
#: Linux's SO_ATTACH_FILTER, and a program for it that drops requests for a new connection (SYN) and nothing else.
_ATTACH_FILTER = 26
_NO_NEW = b"".join(
    struct.pack("=HBBI", *step)
    for step in ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 2**32 - 1))
)


class Protocol(H11Protocol):
    """One of at most ``most`` connections."""

    most: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """If there are too many, close the one that has waited longest; if none waits, refuse this one."""
        super().connection_made(transport)
        transport.max_size = _READ  # type: ignore[attr-defined]
        # On Windows `time.monotonic` gives the same time to all that come within 16 ms.
        self._since = time.perf_counter()
        #: Since when headers, or the rest of them, are awaited; None once they are complete.
        self.headless: float | None = self._since
        if len(self.connections) <= self.most:
            return
        others: Any = self.connections - {self}
        oldest = min((other for other in others if other.waits), key=lambda other: other._since, default=None)
        if oldest is None:
            transport.write(_FULL)
            transport.close()
        else:
            oldest.transport.abort()

    @property
    def waits(self) -> bool:
        """Whether it waits for its client: for a request, the rest of one, or until an answer is read."""
        idle = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        return bool(idle or self.flow.write_paused)

    def data_received(self, data: bytes) -> None:
        """Read data; complete headers stop the clock."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        now = time.perf_counter()
        if self.conn.their_state is h11.IDLE:
            self.headless = self.headless or now
        else:
            self._since, self.headless = now, None

    def _should_upgrade(self) -> bool:
        """Return False, without uvicorn's two lines in the log."""
        return False


class Server(uvicorn.Server):
    """Serves an application of `create_app` until SIGINT or SIGTERM."""

    def __init__(self, app: Any, *, host: str, port: int, limits: Limits) -> None:
        most, at_once = _room(int(limits.connections))
        self._limits = limits
        # The limits of `Protocol` need asyncio's own transports: uvloop's read as much at once as they like.
        config = uvicorn.Config(
            app, host=host, port=port, http=type("Protocol", (Protocol,), {"most": most}), ws="none",
            backlog=at_once, loop="asyncio", access_log=False, server_header=False, log_level="info",
            timeout_keep_alive=30, timeout_graceful_shutdown=int(limits.seconds) + 5,
            h11_max_incomplete_event_size=_HEADERS,
        )  # fmt: skip
        super().__init__(config)
        # Freed bodies go back to the system; gaps in the heap would hold as much once more.
        with contextlib.suppress(TypeError, AttributeError):  # Windows; another C library
            for option, size in _HEAP.items():
                ctypes.CDLL(None).mallopt(option, size)

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: close connections whose headers take too long."""
        latest, connections = time.perf_counter() - self._limits.header_seconds, self.server_state.connections
        for connection in cast("list[Protocol]", list(connections)):
            if connection.headless is not None and connection.headless < latest:
                connection.transport.abort()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Let /ready fail for load balancers; requests that still arrive are answered, with Connection: close."""
        self.config.app.state.draining = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connection, answer those that wait in the listening queue, then end."""
        for server in self.servers:
            for listener in server.sockets:
                _refuse_new(listener)
        start = time.monotonic()
        while (passed := time.monotonic() - start) < _MOST and not self.force_exit:
            connections: Any = self.server_state.connections
            if passed >= _LEAST and all(connection.cycle is not None for connection in connections):
                break
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def _room(connections: int) -> tuple[int, int]:
    """Return how many connections may be open, and how many are accepted at once, by the system's limit of open files.

    If files run out, asyncio fills the log with megabytes a second and answers nobody.
    """
    files = needed = connections + _AT_ONCE + _FILES
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = (needed if most < 0 else most for most in resource.getrlimit(resource.RLIMIT_NOFILE))
        files = min(needed, soft)
        if files < (most := min(needed, hard)):
            # macOS may refuse what it names as the limit.
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            files = most
    connections = max(1, min(connections, (files - _FILES) // 2))
    return connections, max(1, min(_AT_ONCE, files - _FILES - connections))


def _refuse_new(listener: Any) -> None:
    """Drop requests for new connections; their senders try again and find the port closed, or another server."""
    program = ctypes.create_string_buffer(_NO_NEW)
    with contextlib.suppress(OSError, AttributeError):
        listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(program)))
