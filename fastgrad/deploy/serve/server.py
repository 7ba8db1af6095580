"""The web server: uvicorn, with limits on connections, headers and refused bodies, that shuts down without losses."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import re
import signal
import socket
import struct
import time
from typing import Any, cast

from fastgrad.checks import extra
from fastgrad.deploy.serve.bodies import Limits
from fastgrad.deploy.serve.child import LOG

with extra("serve"):
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

#: Most bytes of a request's headers, and their largest number: each takes 5 % of the time of a plain request.
_HEADER_BYTES, _HEADER_COUNT = 16 * 2**10, 100
_END = re.compile(rb"\n\r?\n")
#: How much of a refused body is read, as a multiple of the largest body; clients that send more may miss the reason.
_REFUSED_BODIES = 4
#: Bytes that are read at once, and thus held for a connection whose request waits.
_READ = 2**14
#: Seconds of a shutdown in which new connections, and used ones, may send a request, and for processes to end.
_NEW_SECONDS, _USED_SECONDS, _END_SECONDS = 1.0, 5.0, 2.0
#: Options of the GNU C library's ``mallopt``: freed blocks above the first size, and free memory above the second size
#: at the end of the heap, go back to the system.
_HEAP = {-3: 2**20, -1: 2**24}
#: Connections accepted at once, and files that a process opens in addition to its connections.
_BACKLOG, _OTHER_FILES = 2048, 128
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
#: Linux's SO_ATTACH_FILTER, and a program for it that drops only requests for a new connection (SYN).
_ATTACH_FILTER = 26
_DROP_NEW = b"".join(
    struct.pack("=HBBI", *step)
    for step in ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 2**32 - 1))
)


class _Connection(h11.Connection):
    """Does not read what is expensive to parse: many headers, and bodies in chunks, which `Guard` refuses."""

    refused = False

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            waiting, _ = self.trailing_data
            end = _END.search(waiting)
            self.refused = waiting.count(b"\n", 0, end.start() if end else len(waiting)) > _HEADER_COUNT
            if self.refused:
                raise h11.RemoteProtocolError("too many headers")
        event = h11.NEED_DATA if self.refused else super().next_event()
        if isinstance(event, h11.Request):
            self.refused = any(name == b"transfer-encoding" for name, _ in event.headers)
        return event

    def send(self, event: Any) -> Any:
        """Send; an answer before the end of the body closes the connection."""
        if isinstance(event, h11.Response) and self.their_state is h11.SEND_BODY:
            headers = [*event.headers, (b"connection", b"close")]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)


class Protocol(H11Protocol):
    """One of at most ``most_connections``; ``refused_bytes`` are read after a refusal."""

    most_connections: int
    refused_bytes: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """If there are too many, close the one that has waited longest for its client, or else refuse this one."""
        super().connection_made(transport)
        self.conn = _Connection(h11.SERVER, _HEADER_BYTES)
        transport.max_size = _READ  # type: ignore[attr-defined]
        self._close, transport.close = transport.close, self._close_when_read  # type: ignore[method-assign]
        self._since = time.perf_counter()  # on Windows `time.monotonic` has steps of 16 ms
        #: Since when headers, or the rest of a refused body, have been awaited; None if neither is.
        self.overdue: float | None = self._since
        #: Bytes that may still come and are discarded before the connection closes; None before a refusal.
        self._left: int | None = None
        # Aborted ones stay in the set until the loop comes to them: each new one must close another.
        others: list[Any] = [c for c in self.connections if c is not self and not c.transport.is_closing()]
        if len(others) >= self.most_connections:
            waiting = sorted((other for other in others if other.waits), key=lambda other: other._since)
            for oldest in waiting[:1]:
                oldest.transport.abort()
            if not waiting:
                transport.write(_BUSY)
                transport.close()

    @property
    def waits(self) -> bool:
        """Whether it waits for its client: for a request, the rest of one, or an answer to be read."""
        idle = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
        return bool(idle or self.flow.write_paused)

    def data_received(self, data: bytes) -> None:
        """Read data; complete headers stop the clock."""
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                self.transport.abort()
        elif not self.transport.is_closing():
            super().data_received(data)
            now = time.perf_counter()
            if self.conn.their_state is h11.IDLE:
                self.overdue = self.overdue or now
            elif self._left is None:  # else it was refused
                self._since, self.overdue = now, None

    def _close_when_read(self) -> None:
        """Close; if the client is still sending, only after it has had time to read the refusal.

        If the connection closed at once, the system would also drop the answer.
        """
        refused: bool = self.conn.refused or self.conn.their_state in (h11.SEND_BODY, h11.ERROR)  # type: ignore[attr-defined]
        if self._left is None and refused:
            self._left, self.overdue = self.refused_bytes, time.perf_counter()
            self.transport.write_eof()
        else:
            self._close()

    def _should_upgrade(self) -> bool:
        return False  # without uvicorn's two lines in the log


class Server(uvicorn.Server):
    """Serves an application of `create_app` until SIGINT or SIGTERM."""

    def __init__(self, app: Any, *, host: str, port: int, limits: Limits) -> None:
        most, backlog = _connection_limits(int(limits.connections))
        self._limits = limits
        # The limits of `Protocol` need asyncio's own transports: those of uvloop read any amount at once.
        own = {"most_connections": most, "refused_bytes": _REFUSED_BODIES * int(limits.body)}
        config = uvicorn.Config(
            app, host=host, port=port, http=type("Protocol", (Protocol,), own), ws="none",
            backlog=backlog, loop="asyncio", access_log=False, server_header=False, log_level="info",
            timeout_keep_alive=30,
        )  # fmt: skip
        super().__init__(config)
        # Any client could fill the log with the first; why a start failed is logged without the second.
        LOG.addFilter(lambda record: not str(record.msg).startswith(("Invalid HTTP", "Traceback")))
        # Freed bodies go back to the system; gaps in the heap would hold as much memory again.
        with contextlib.suppress(TypeError, AttributeError):  # Windows; another C library
            for option, size in _HEAP.items():
                ctypes.CDLL(None).mallopt(option, size)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and reload the model files on SIGHUP."""
        await super().startup(sockets)
        with contextlib.suppress(AttributeError, NotImplementedError):  # Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.config.app.state.reload.set)  # type: ignore[union-attr]

    async def on_tick(self, counter: int) -> bool:
        """Close connections whose headers or refused bodies take too long; called every tenth of a second."""
        latest, connections = time.perf_counter() - self._limits.header_seconds, self.server_state.connections
        for connection in cast("list[Protocol]", list(connections)):
            if connection.overdue is not None and connection.overdue < latest:
                connection.transport.abort()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Let /ready fail for load balancers; requests that still arrive are answered with Connection: close."""
        self.config.app.state.draining = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no new connection, answer those in the listening queue, then end, within the time limit."""
        for server in self.servers:
            for listener in server.sockets:
                _refuse_new(listener)
        start, limit = time.monotonic(), self._limits.drain_seconds - _END_SECONDS
        while (passed := time.monotonic() - start) < min(_USED_SECONDS, limit) and not self.force_exit:
            connections: Any = self.server_state.connections
            if passed >= _NEW_SECONDS and all(connection.cycle is not None for connection in connections):
                break
            await asyncio.sleep(0.05)
        self.config.timeout_graceful_shutdown = max(0.1, limit - passed)  # type: ignore[assignment]
        await super().shutdown(sockets)


def _connection_limits(connections: int) -> tuple[int, int]:
    """Return how many connections may be open, and accepted at once, within the system's limit of open files.

    If files run out, asyncio fills the log with megabytes a second and answers nobody.
    """
    files = -1
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit; macOS may refuse its own
        import resource

        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        files = most
    # Four times the backlog may wait until the connections that make room for them are closed.
    share = _BACKLOG if files < 0 else max(1, (files - _OTHER_FILES) // 5)
    return min(connections, share), min(_BACKLOG, share)


def _refuse_new(listener: Any) -> None:
    """Drop requests for new connections; clients try again and find the port closed, or another server."""
    program = ctypes.create_string_buffer(_DROP_NEW)
    with contextlib.suppress(OSError, AttributeError):
        listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(program)))
