"""The server's load ends at an answer that is missing, refused or wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

pytest.importorskip("PIL")

from bench.deploy.serve_load import Clients


@pytest.mark.parametrize(
    ("status", "uncertainty", "problem"),
    [(b"200 OK", 1.0, None), (b"200 OK", 2.0, RuntimeError), (b"503 Busy", 1.0, RuntimeError), (b"", 1.0, EOFError)],
    ids=["right", "wrong", "refused", "missing"],
)
def test_every_answer_is_checked(status: bytes, uncertainty: float, problem: type[Exception] | None) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            while (line := await reader.readline()).strip():
                head = line
            await reader.readexactly(int(head.rsplit(b" ", 1)[1]))
            if not status:
                break
            content = json.dumps({"uncertainty": uncertainty}).encode()
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content))
        writer.close()

    async def run() -> list[float]:
        async with await asyncio.start_server(behave, "127.0.0.1", 0) as server:
            clients = object.__new__(Clients)
            clients.port, clients.jobs, clients.expected = (server.sockets[0].getsockname()[1], [b"image"], [1.0])
            try:
                return await clients.connection(0, 20)
            finally:
                await asyncio.sleep(0.1)  # until the server has closed its side

    with pytest.raises(problem) if problem else contextlib.nullcontext():
        assert len(asyncio.run(run())) == 20
