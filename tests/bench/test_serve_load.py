"""The server's load counts what is missing, refused or wrong."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest

pytest.importorskip("PIL")

from bench.deploy import clients


def test_every_answer_is_counted_for_what_it_is() -> None:
    numbers = itertools.count()

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Right, wrong, refused, no answer, again and again."""
        while head := await reader.readline():
            while (line := await reader.readline()).strip():
                head = line
            await reader.readexactly(int(head.rsplit(b" ", 1)[1]))
            kind = next(numbers) % 4
            if kind == 3:
                break
            content = json.dumps({"uncertainty": 2.0 if kind == 1 else 1.0}).encode()
            status = b"503 Busy" if kind == 2 else b"200 OK"
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content))
        writer.close()
        await writer.wait_closed()

    async def run() -> clients.Tally:
        async with await asyncio.start_server(behave, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await clients.connection(port, 0, [b"image"], [1.0], 20)

    tally = asyncio.run(run())
    assert (len(tally.times), tally.errors, tally.wrong) == (15, 10, 5)
    both = tally + tally
    assert (len(both.times), both.errors, both.wrong) == (30, 20, 10)
