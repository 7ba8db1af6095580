"""The web server: uvicorn, with limits on connections, headers and refused bodies, and an end that cuts nothing off."""

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

#: Bytes of a request's headers, and how many there may be: each takes a twentieth of the time of a plain request.
_HEADERS, _COUNT = 16 * 2**10, 100
_END = re.compile(rb"\n\r?\n")
#: Bytes that are read of a body after its refusal, as a multiple of the largest body; who sends more may not learn why.
_REST = 4
#: Bytes that are read at once, and so held for a connection whose request waits.
_READ = 2**14
#: Seconds of a shutdown for connections that are new, or were in use, to send a request, and for processes to end.
_LEAST, _MOST, _LAST = 1.0, 5.0, 2.0
#: Options of the GNU C library's ``mallopt``: blocks above the first size go back to the system when they are freed, as
#: does what is free at the heap's end above the second.
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


class _Connection(h11.Connection):
    """Does not read what costs far more than it should: many headers, and bodies in chunks, which `Guard` refuses."""

    refused = False

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            waiting, _ = self.trailing_data
            end = _END.search(waiting)
            self.refused = waiting.count(b"\n", 0, end.start() if end else len(waiting)) > _COUNT
            if self.refused:
                raise h11.RemoteProtocolError("too many headers")
        event = h11.NEED_DATA if self.refused else super().next_event()
        if isinstance(event, h11.Request):
            self.refused = any(name == b"transfer-encoding" for name, _ in event.headers)
        return event

    def send(self, event: Any) -> Any:
        """Send; an answer that comes before the whole body is the last."""
        if isinstance(event, h11.Response) and self.their_state is h11.SEND_BODY:
            headers = [*event.headers, (b"connection", b"close")]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)


class Protocol(H11Protocol):
    """One of at most ``most`` connections; ``rest`` bytes are read after a refusal."""

    most: int
    rest: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """If there are too many, close the one that waits longest for its client; if none does, refuse this one."""
        super().connection_made(transport)
        self.conn = _Connection(h11.SERVER, _HEADERS)
        transport.max_size = _READ  # type: ignore[attr-defined]
        self._close, transport.close = transport.close, self._close_when_read  # type: ignore[method-assign]
        self._since = time.perf_counter()  # on Windows `time.monotonic` has steps of 16 ms
        #: Since when headers, or the rest of a refused body, are awaited; None while neither is.
        self.overdue: float | None = self._since
        #: Bytes that may still come, and are not read, before it closes.
        self._left: int | None = None
        if len(self.connections) > self.most:
            others: Any = self.connections - {self}
            waiting = sorted((other for other in others if other.waits), key=lambda other: other._since)
            for oldest in waiting[:1]:
                oldest.transport.abort()
            if not waiting:
                transport.write(_FULL)
                transport.close()

    @property
    def waits(self) -> bool:
        """Whether it waits for its client: for a request, the rest of one, or until an answer is read."""
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
        """Close; if the client has more to send, when it has had time to read why that is refused.

        Closed at once, the system would also drop the answer.
        """
        refused: bool = self.conn.refused or self.conn.their_state in (h11.SEND_BODY, h11.ERROR)  # type: ignore[attr-defined]
        if self._left is None and refused:
            self._left, self.overdue = self.rest, time.perf_counter()
            self.transport.write_eof()
        else:
            self._close()

    def _should_upgrade(self) -> bool:
        return False  # without uvicorn's two lines in the log


class Server(uvicorn.Server):
    """Serves an application of `create_app` until SIGINT or SIGTERM."""

    def __init__(self, app: Any, *, host: str, port: int, limits: Limits) -> None:
        most, at_once = _room(int(limits.connections))
        self._limits = limits
        # The limits of `Protocol` need asyncio's own transports: uvloop's read as much at once as they like.
        own = {"most": most, "rest": _REST * int(limits.body)}
        config = uvicorn.Config(
            app, host=host, port=port, http=type("Protocol", (Protocol,), own), ws="none",
            backlog=at_once, loop="asyncio", access_log=False, server_header=False, log_level="info",
            timeout_keep_alive=30,
        )  # fmt: skip
        super().__init__(config)
        # Any client could fill the log with the first; why the server does not start is said without the second.
        LOG.addFilter(lambda record: not str(record.msg).startswith(("Invalid HTTP", "Traceback")))
        # Freed bodies go back to the system; gaps in the heap would hold as much once more.
        with contextlib.suppress(TypeError, AttributeError):  # Windows; another C library
            for option, size in _HEAP.items():
                ctypes.CDLL(None).mallopt(option, size)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and load the model files again on SIGHUP."""
        await super().startup(sockets)
        with contextlib.suppress(AttributeError, NotImplementedError):  # Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.config.app.state.reload.set)  # type: ignore[union-attr]

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: close connections whose headers, or refused bodies, take too long."""
        latest, connections = time.perf_counter() - self._limits.header_seconds, self.server_state.connections
        for connection in cast("list[Protocol]", list(connections)):
            if connection.overdue is not None and connection.overdue < latest:
                connection.transport.abort()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Let /ready fail for load balancers; requests that still arrive are answered, with Connection: close."""
        self.config.app.state.draining = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connection, answer those that wait in the listening queue, then end, within the limit."""
        for server in self.servers:
            for listener in server.sockets:
                _refuse_new(listener)
        start, limit = time.monotonic(), self._limits.drain_seconds - _LAST
        while (passed := time.monotonic() - start) < min(_MOST, limit) and not self.force_exit:
            connections: Any = self.server_state.connections
            if passed >= _LEAST and all(connection.cycle is not None for connection in connections):
                break
            await asyncio.sleep(0.05)
        self.config.timeout_graceful_shutdown = max(0.1, limit - passed)  # type: ignore[assignment]
        await super().shutdown(sockets)


def _room(connections: int) -> tuple[int, int]:
    """Return how many connections may be open, and how many are accepted at once, by the system's limit of open files.

    If files run out, asyncio fills the log with megabytes a second and answers nobody.
    """
    files = -1
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit; macOS may refuse its own
        import resource

        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        files = most
    # Four times as many as are accepted at once may wait until those that make room for them are closed.
    share = _AT_ONCE if files < 0 else max(1, (files - _FILES) // 5)
    return min(connections, share), min(_AT_ONCE, share)


def _refuse_new(listener: Any) -> None:
    """Drop requests for new connections; their senders try again and find the port closed, or another server."""
    program = ctypes.create_string_buffer(_NO_NEW)
    with contextlib.suppress(OSError, AttributeError):
        listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", 4, ctypes.addressof(program)))
