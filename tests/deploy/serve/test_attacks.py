"""Whatever arrives: an answer or a 4xx in one sentence, little memory, and an event loop that is never away for long.

The slow form of each attack is larger; it prints what the documentation's table says.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import selectors
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("PIL")

import serve_client
from serve_client import Server, form, image, png, running, wait_for, workers_of

from fastgrad.deploy.serve.server import _connection_limits

#: Of this machine; an answer may quote what was sent, but no path.
FOLDERS = (tempfile.gettempdir(), sys.prefix, str(Path(__file__).parents[3]))
#: What the web process may take above its idle size, and how long one callback may keep the event loop.
MEMORY, PAUSE = 100.0, 0.050


@pytest.fixture(scope="module")
def served(shared: dict[str, Any]) -> Any:
    """Of one kind: no attack comes as far as the file."""
    return shared["onnx"]


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


def head(served: Any, header: str) -> bytes:
    """What comes before the body of an image."""
    lines = (f"POST /predict/{served.name} HTTP/1.1", "Host: localhost", "Content-Type: image/png", header, "", "")
    return "\r\n".join(lines).encode()


def post(served: Any, body: bytes, kind: str) -> int:
    status, answer = served.predict(body, kind)
    assert status == 200 or (400 <= status < 500 or status in (503, 504)), (status, answer)
    if status != 200:
        assert 0 < len(answer["detail"]) < 500
        assert not any(folder in answer["detail"] for folder in FOLDERS)
    return status


def at_once(served: Any, bodies: list[tuple[bytes, str]], clients: int) -> Counter[int]:
    with ThreadPoolExecutor(clients) as pool:
        return Counter(pool.map(lambda sent: post(served, *sent), bodies))


def drip(served: Any, count: int, head: bytes) -> int:
    """Send a head on many connections, then a byte a second; how many the server answers or closes."""
    sockets, ended = [], selectors.DefaultSelector()
    for _ in range(count):
        with contextlib.suppress(OSError):
            sockets.append(connect(served.server))
            ended.register(sockets[-1], selectors.EVENT_READ)
            sockets[-1].sendall(head)
    end = time.monotonic() + 60
    while len(ended.select(0)) < len(sockets) and time.monotonic() < end:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.send(b"x")
        time.sleep(1)
    closed = len(ended.select(0))
    ended.close()
    for each in sockets:
        each.close()
    return closed


@counts(60, 600)
@pytest.mark.parametrize("kind", ["headers", "bodies"])
def test_slow_clients_are_closed(served: Any, kind: str, count: int) -> None:
    start = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-" if kind == "headers" else head(served, LENGTH)
    with watched(served, f"slow {kind}, {count} connections"):
        assert drip(served, count, start) == count


LENGTH = "Content-Length: 1000000"
CHUNKED = "Transfer-Encoding: chunked"
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
def test_requests_that_are_refused_by_their_headers(served: Any, name: str) -> None:
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
def test_chunks_on_many_connections_without_a_key(guarded: Server, count: int) -> None:
    """h11 parses each chunk of one byte, also after the refusal."""
    block = b"POST / HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED.encode() + b"\r\n\r\n" + b"1\r\nx\r\n" * 200_000
    slowest, over = 0.0, time.monotonic() + 5
    with connections(guarded, count) as opened, ThreadPoolExecutor(20) as pool:
        sending = [pool.submit(lambda s=each: contextlib.suppress(OSError)(s.sendall)(block)) for each in opened]
        while time.monotonic() < over or not all(each.done() for each in sending):
            start = time.perf_counter()
            assert guarded.request("GET", "/ready")[0] == 200
            slowest = max(slowest, time.perf_counter() - start)
    print(f"chunks on {count} connections: /ready at most {1000 * slowest:.0f} ms")
    assert slowest < 1


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
def test_a_body_without_end_is_closed_and_a_large_one_gets_its_refusal(guarded: Server, close: bytes) -> None:
    start = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n" + close + b"Content-Length: %d\r\n\r\n"
    with connect(guarded) as sent:
        sent.sendall(start % 10**12)
        size = 0
        with contextlib.suppress(ConnectionError):
            while size < 1000:
                sent.sendall(bytes(2**20))
                size += 1
        print(f"a body without end: closed after {size} MiB")
        assert size < 100
    with connect(guarded) as sent:
        sent.sendall(start % (40 * 2**20) + bytes(40 * 2**20))
        answer = everything(sent)
        assert b" 401 " in answer.split(b"\r\n")[0]
        assert b"connection: close" in answer.lower()


@pytest.fixture(scope="module")
def guarded(tiny_onnx: Path) -> Iterator[Server]:
    """A server that asks for a key."""
    with running(tiny_onnx, env={"FASTGRAD_API_KEY": "secret"}) as server:
        yield server


def gray(width: int, height: int) -> bytes:
    """A PNG of sixteen bits and few bytes."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(2 * width + 1)) for _ in range(height)) + packer.flush()
    return png(width, height, 16, 0, rows)


@counts(8, 100)
def test_images_that_decode_to_much(served: Any, count: int) -> None:
    with watched(served, f"{count} images of 10 megapixels and 16 bits"):
        found = at_once(served, [(gray(4000, 2500), "image/png")] * count, count)
    assert set(found) <= {200, 422, 503, 504}
    assert at_once(served, [(gray(7071, 7071), "image/png")] * 8, 8) == {413: 8}


@counts(8, 64)
def test_large_bodies(served: Any, count: int) -> None:
    body = random.Random(0).randbytes(2**20) * 15
    numbers = b'{"inputs": [' + b"1.0," * (15 * 2**18) + b"1]}"
    kinds = [(body, "image/png"), (numbers, "application/json"), (b"[" * len(body), "application/json"),
             (b"\r\n--b" * (3 * 2**20), "multipart/form-data; boundary=b")]  # fmt: skip
    with watched(served, f"{count} bodies of 15 MiB"):
        found = at_once(served, kinds * (count // 4), 16)
    assert set(found) <= {400, 408, 422, 503}
    assert found[503] < count


@counts(200, 10_000)
def test_mutated_bodies(served: Any, count: int) -> None:
    rng, decoders = random.Random(7), sorted(workers_of(served.server.process.pid, b"serve.decoder"))
    inputs = json.dumps({"inputs": [[[0.5] * 8] * 8] * 3}).encode()
    formats = ("PNG", "PNG", "JPEG", "JPEG", "WEBP", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    seeds = [
        *((image(n, ((8, 8), (61, 40))[n % 2], kind), f"image/{kind.lower()}") for n, kind in enumerate(formats)),
        form("file", image(2)), (inputs, "application/json"), (b'{"inputs": [[1, 2], [3, 4]]}', "application/json"),
    ]  # fmt: skip
    bodies = [mutated(rng, *rng.choice(seeds)) for _ in range(count)]
    with watched(served, f"{count} mutated bodies"):
        found = at_once(served, bodies, 8)
    print(dict(sorted(found.items())))
    assert set(found) <= {200, 400, 413, 415, 422}
    assert found[200] > 0
    assert found[400] > 0
    assert sorted(workers_of(served.server.process.pid, b"serve.decoder")) == decoders


def mutated(rng: random.Random, body: bytes, kind: str) -> tuple[bytes, str]:
    content = bytearray(body)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0:
                content[place:place] = rng.randbytes(rng.randint(1, 30))
            case 1:
                del content[place : place + rng.randint(1, 60)]
            case 2 if place < len(content):
                content[place] ^= 1 << rng.randrange(8)
            case 3:
                content[place : place + 4] = struct.pack(">I", rng.choice([0, 1, 2**31, 2**32 - 1]))
            case 4:
                content[place:place] = content[: rng.randint(0, 100)]
            case _:
                content[place:] = b""
    if rng.random() < 0.1:
        odd = ["", "image/", "other", "application/json", "multipart/form-data; boundary=", "image/png; x=\xff"]
        kind = rng.choice(odd)
    return bytes(content) or b"\0", kind


STOPPED: dict[str, tuple[bytes, Callable[[], tuple[bytes, str]]]] = {
    "a process that reads bodies": (b"serve.decoder", lambda: (image(1, (900, 900)), "image/png")),
    "a process of the model": (b"serve.worker", lambda: (image(1), "image/png")),
}


@pytest.mark.parametrize("which", STOPPED)
def test_processes_stopped_in_the_middle_of_a_send(served: Any, which: str) -> None:
    module, make = STOPPED[which]
    pids = workers_of(served.server.process.pid, module)
    with watched(served, f"{which}, stopped"):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        if module == b"serve.decoder":
            found = at_once(served, [make()] * 4, 4)
            # Those that waited for a stopped process are told; for the others there is a new one.
            assert set(found) <= {200, 422}
            assert found[422] >= 1
        else:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            assert at_once(served, [make()] * 4, 4) == {200: 4}
    wait_for(lambda: len(workers_of(served.server.process.pid, module)) == len(pids))
    assert served.predict(*make())[0] == 200


@counts(4, 260)
def test_the_interface_holds_to_its_description(served: Any, count: int) -> None:
    """Whatever fits the OpenAPI description or does not is answered as the description says."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{served.server.port}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    tried: Counter[int] = Counter()
    with watched(served, f"schemathesis, {count} cases of each of {len(operations)} operations"):
        for operation in operations:

            @settings(
                max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy())
            def check(case: Any) -> None:
                response = case.call(timeout=60)
                tried[response.status_code] += 1
                assert response.status_code < 500 or response.status_code in (503, 504)
                # That a string is an image no schema can say.
                case.validate_response(response, excluded_checks=[positive_data_acceptance])

            check()
    print(dict(sorted(tried.items())))
    # Of operations without parameters there is one case each.
    assert tried.total() >= (2000 if count > 4 else 2 * len(operations))


def asks_without_reading(idle: socket.socket) -> None:
    """Send requests whose answers fill all that lies between the two."""
    idle.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(1000):
            idle.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)


@pytest.mark.parametrize("do", [lambda idle: None, asks_without_reading], ids=["idle", "do not read"])
def test_the_connection_that_waits_longest_makes_room(few: Server, do: Callable[[socket.socket], None]) -> None:
    with connections(few, 8) as waiting:
        for each in waiting:
            do(each)
        # Once the server waits for all of them.
        wait_for(lambda: few.request("GET", "/health")[0] == 200)
        assert [few.request("GET", "/health")[0] for _ in range(4)] == [200] * 4


def test_one_connection_makes_room_for_one(few: Server) -> None:
    with connections(few, 8) as idle:
        assert few.predict(image(), "image/png")[0] == 200
        assert everything(idle[0]) == b""
        # The others wait on.
        idle[7].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in idle[7].recv(1000)


@pytest.fixture(scope="module")
def few(tiny_onnx: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of at most eight connections, whose clock goes by the steps that Windows has.

    It has uvloop, which uvicorn would choose; its transports have no limit of what they read at once.
    """
    folder = tmp_path_factory.mktemp("few")
    clock = "import time; plain = time.monotonic; time.monotonic = lambda: plain() // 0.015625 * 0.015625"
    (folder / "sitecustomize.py").write_text(clock)
    (folder / "uvloop.py").write_text("raise RuntimeError('uvloop was imported')")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    with running(tiny_onnx, "--max-connections", "8", env={"PYTHONPATH": path}) as server:
        yield server


def test_more_connections_than_open_files(tiny_onnx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for fewer then; asyncio's log would grow without end."""
    pytest.importorskip("resource")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)){serve_client.COMMAND}"
    monkeypatch.setattr(serve_client, "COMMAND", limit)
    with running(tiny_onnx) as server, connections(server, 300):
        assert server.predict(image(), "image/png")[0] == 200
        assert len(server.log) < 10_000


@pytest.mark.parametrize(
    ("files", "room"), [(20_000, (512, 2048)), (4096, (512, 793)), (-1, (512, 2048)), (256, (25, 25)), (20, (1, 1))]
)
def test_connections_fit_the_open_files(files: int, room: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (15, files))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, most: asked.append(most))
    assert _connection_limits(512) == room
    assert asked == [(files, files)]


def test_the_hard_limit_of_open_files_may_be_more_than_the_system_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 2**63 - 1))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: int("more than the kernel's own"))
    assert _connection_limits(512) == (25, 25)


def test_slow_bodies_do_not_hold_the_end(tiny_onnx: Path) -> None:
    with running(tiny_onnx, "--drain-seconds", "3") as server, connections(server, 4) as slow:
        start = (
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 10000000\r\n\r\n"
        )
        for each in slow:
            each.sendall(start + bytes(200_000))
        wait_for(lambda: server.request("GET", "/health")[0] == 200)
        before = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - before < 5


def test_a_signal_to_load_the_files_ends_nothing(tiny_onnx: Path) -> None:
    with running(tiny_onnx) as server:
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "is what it was" in server.log)
        assert server.predict(image(), "image/png")[0] == 200


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_copies_of_killed_workers_do_not_stay(tiny_package: Path, tiny_onnx: Path, tmp_path: Path, kind: str) -> None:
    """Nor is anything read or written under a name that another user of the machine can foresee."""

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.rglob("*.so")) + sorted(
            path.name[:14] for path in tmp_path.iterdir()
        )

    with running(tiny_package if kind == "pt2" else tiny_onnx, env={"TMPDIR": str(tmp_path)}) as server:
        before = names()
        assert before[-1:] == ["fastgrad-serve"]
        for _ in range(2):
            (pid,) = workers_of(server.process.pid)
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: workers_of(server.process.pid) not in ([], [pid]))
            assert server.predict(image(), "image/png")[0] == 200
        assert names() == before
        os.kill(workers_of(server.process.pid)[0], signal.SIGKILL)
    assert names() == []
