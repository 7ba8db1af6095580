"""Connections: slow, many, refused by their headers, or open at the end; none takes the server out of the balancer."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import serve_client
from serve_attack import connect, connections, counts, watched
from serve_client import Server, image, proc, running, wait_for

from fastgrad.deploy.serve.server import _connection_limits

LENGTH = "Content-Length: 1000000"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def served(shared: dict[str, Any]) -> Any:
    """Of one kind: no attack comes as far as the file."""
    return shared["onnx"]


def head(served: Any, header: str) -> bytes:
    """What comes before the body of an image."""
    lines = (f"POST /predict/{served.name} HTTP/1.1", "Host: localhost", "Content-Type: image/png", header, "", "")
    return "\r\n".join(lines).encode()


@counts(60, 600)
def test_slow_clients_are_closed(served: Any, count: int) -> None:
    """Half of them send headers, half a body, a byte a second each."""
    heads = [b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-", head(served, LENGTH)]
    with watched(served, f"slow headers and bodies, {count} connections"), contextlib.ExitStack() as opened:
        # Those that the server has answered or closed.
        ended = opened.enter_context(selectors.DefaultSelector())
        sockets = opened.enter_context(connections(served.server, count))
        for number, each in enumerate(sockets):
            ended.register(each, selectors.EVENT_READ)
            each.sendall(heads[number % 2])
        end = time.monotonic() + 60
        while len(ended.select(0)) < count and time.monotonic() < end:
            for each in sockets:
                with contextlib.suppress(OSError):
                    each.send(b"x")
            time.sleep(1)
        assert len(ended.select(0)) == count


#: What is refused by its headers, before its body or the next request is read: headers, what follows, the status.
REFUSED = {
    "a body in 200,000 chunks": ([CHUNKED], b"1\r\nx\r\n" * 200_000, 411),
    "both lengths": ([LENGTH, CHUNKED], b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
    "another encoding": (["Transfer-Encoding: gzip, chunked"], b"0\r\n\r\n", 400),
    "two lengths": ([LENGTH, "Content-Length: 2"], b"xx", 400),
    "3,000 headers": (["a:"] * 3000, b"", 400),
    "headers without end": (["a:"] * 300_000, b"", 400),
    "a header without end": (["a: " + "b" * 300_000], b"", 400),
    "no HTTP": (["no header"], b"", 400),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_headers(served: Any, name: str) -> None:
    headers, rest, status = REFUSED[name]
    before = served.server.log
    with watched(served, name), connect(served.server) as sent:
        with contextlib.suppress(ConnectionError):
            sent.sendall(head(served, "\r\n".join(headers)) + rest)
        answer = everything(sent)
    first, *others = re.findall(rb"^HTTP/1\.1 (\d+)", answer, re.MULTILINE)
    assert (int(first), others) == (status, [])
    # No request may fill the log.
    assert served.server.log == before


def everything(sent: socket.socket) -> bytes:
    """What comes until the server closes the connection, within ten seconds."""
    answer = b""
    sent.settimeout(10)
    with contextlib.suppress(ConnectionError):
        while part := sent.recv(2**16):
            answer += part
    return answer


@counts(10, 100)
def test_chunks_on_many_connections(served: Any, count: int) -> None:
    """h11 parses each chunk of one byte, also after the refusal."""
    block, server = head(served, CHUNKED) + b"1\r\nx\r\n" * 200_000, served.server
    slowest, over = 0.0, time.monotonic() + 5
    with connections(server, count) as opened, ThreadPoolExecutor(20) as pool:
        sending = [pool.submit(lambda s=each: contextlib.suppress(OSError)(s.sendall)(block)) for each in opened]
        while time.monotonic() < over or not all(each.done() for each in sending):
            start = time.perf_counter()
            assert server.request("GET", "/ready")[0] == 200
            slowest = max(slowest, time.perf_counter() - start)
    print(f"chunks on {count} connections: /ready at most {1000 * slowest:.0f} ms")
    assert slowest < 1


@pytest.fixture(scope="module")
def few(tiny_onnx: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of at most eight connections, whose clock goes by the steps that Windows has.

    It asks for a key, and has uvloop, which uvicorn would choose; its transports do not limit what they read at once.
    """
    folder = tmp_path_factory.mktemp("few")
    (folder / "sitecustomize.py").write_text(
        "import time; plain = time.monotonic; time.monotonic = lambda: plain() // 0.015625 * 0.015625"
    )
    (folder / "uvloop.py").write_text("raise RuntimeError('uvloop was imported')")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    options = ("--max-connections", "8", "--drain-seconds", "3")
    with running(tiny_onnx, *options, env={"PYTHONPATH": path, "FASTGRAD_API_KEY": "secret"}) as server:
        yield server


KEY = {"Authorization": "Bearer secret"}


def test_more_connections_than_open_files(tiny_onnx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for fewer then; asyncio's log would grow without end."""
    pytest.importorskip("resource")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)){serve_client.COMMAND}"
    monkeypatch.setattr(serve_client, "COMMAND", limit)
    with running(tiny_onnx) as server, connections(server, 300):
        assert server.predict(image(), "image/png")[0] == 200
        assert len(server.log) < 10_000
        # The server's own, 14 connections, and four times as many that wait to be closed.
        assert len(list((proc(server.process.pid) / "fd").iterdir())) < 100


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
def test_endless_and_large_bodies(few: Server, close: bytes) -> None:
    start = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n" + close + b"Content-Length: %d\r\n\r\n"
    with connect(few) as sent:
        sent.sendall(start % 10**12)
        size = 0
        with contextlib.suppress(ConnectionError):
            while size < 1000:
                sent.sendall(bytes(2**20))
                size += 1
        print(f"a body without end: closed after {size} MiB")
        assert size < 100
    with connect(few) as sent:
        sent.sendall(start % (40 * 2**20) + bytes(40 * 2**20))
        answer = everything(sent)
        assert b" 401 " in answer.split(b"\r\n")[0]
        assert b"connection: close" in answer.lower()


def asks_without_reading(idle: socket.socket) -> None:
    """Send requests whose answers fill all that lies between the two."""
    idle.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(1000):
            idle.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)


@pytest.mark.parametrize("do", [lambda idle: None, asks_without_reading], ids=["idle", "do not read"])
def test_longest_waiting_is_closed(few: Server, do: Callable[[socket.socket], None]) -> None:
    with connections(few, 8) as waiting:
        for each in waiting:
            do(each)
        # Once the server waits for all of them.
        wait_for(lambda: few.request("GET", "/health")[0] == 200)
        assert [few.request("GET", "/health")[0] for _ in range(4)] == [200] * 4


def test_one_makes_room_for_one(few: Server) -> None:
    with connections(few, 8) as idle:
        assert few.predict(image(), "image/png", **KEY)[0] == 200
        assert everything(idle[0]) == b""
        # The others wait on.
        idle[7].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in idle[7].recv(1000)


def test_slow_bodies_at_sigterm(few: Server) -> None:
    """The last test of this server."""
    start = (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\nContent-Length: 10000000\r\n\r\n"
    )
    with connections(few, 4) as slow:
        for each in slow:
            each.sendall(start + bytes(200_000))
        wait_for(lambda: few.request("GET", "/health")[0] == 200)
        before = time.monotonic()
        assert few.stop() == 0
        assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("files", "hard", "expected"),
    [
        (1024, 20_000, (512, 2048)), (1024, 4096, (512, 793)), (-1, -1, (512, 2048)), (15, 256, (25, 25)),
        (15, 20, (1, 1)), (256, 2**63 - 1, (25, 25)),
    ],
)  # fmt: skip
def test_connections_fit_the_open_files(
    files: int, hard: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last is macOS, whose kernel gives fewer than the hard limit says."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, hard))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        resource, "setrlimit", lambda _, most: int("too many") if hard == 2**63 - 1 else asked.append(most)
    )
    assert _connection_limits(512) == expected
    assert asked == ([] if hard == 2**63 - 1 else [(hard, hard)])
