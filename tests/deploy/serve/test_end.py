"""The end of a server: connections that the system has made, though the server has not accepted them, are answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import Any

import pytest
import uvicorn
from starlette.datastructures import State

from fastgrad.commands import serve


class Hello:
    """An application that greets."""

    state = State()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})


@pytest.mark.skipif(sys.platform == "win32", reason="cannot ask a server to end")
def test_connections_that_wait_to_be_accepted_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    # The listening socket is closed before the event loop looks at its queue again.
    monkeypatch.setattr(serve, "_LEAVE_SECONDS", 0)

    async def run() -> list[bytes]:
        config = uvicorn.Config(Hello(), port=0, lifespan="off", log_level="critical")
        server = serve.Server(config)
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        address = server.servers[0].sockets[0].getsockname()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(5)]
            for client in clients:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            await server.shutdown()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
            return [await asyncio.to_thread(client.recv, 4096) for client in clients]

    assert [answer[:15] for answer in asyncio.run(run())] == [b"HTTP/1.1 200 OK"] * 5
