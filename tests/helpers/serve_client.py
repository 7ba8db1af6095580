"""A server in a process of its own, and requests to it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

COMMAND = """
import argparse, asyncio.events, os, signal, sys, time
from fastgrad.commands import serve
if os.environ.get("PAUSES"):
    # The longest that anything has kept the event loop: in seconds of the processor, and of the clock.
    longest, plain, asked = [0.0, 0.0], asyncio.events.Handle._run, 0
    def tell(what):
        # Of a name that no other call has: the signal may come in the middle of one.
        with open(os.environ["PAUSES"] + f".{time.perf_counter_ns()}", "w") as file:
            print(asked, *longest, what, file=file)
        os.replace(file.name, os.environ["PAUSES"])
    def run(handle):
        before, clock, own = asked, time.perf_counter(), time.thread_time()
        plain(handle)
        took = time.thread_time() - own, time.perf_counter() - clock
        if before == asked and (took[0] > longest[0] or took[1] > longest[1]):
            longest[:] = map(max, longest, took)
            tell(handle)
    def forget(*_):
        global asked
        longest[:], asked = [0.0, 0.0], asked + 1
        tell("nothing yet")
    asyncio.events.Handle._run = run
    signal.signal(signal.SIGUSR1, forget)
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    sys.exit(serve.run(parser.parse_args()))
"""


def proc(pid: int | str = "") -> Path:
    """What Linux says of processes, or of one; the test is skipped on other systems."""
    if not sys.platform.startswith("linux"):
        pytest.skip("looks at processes in /proc")
    return Path("/proc") / str(pid)


class Server:
    """``fastgrad serve`` on a free port; Windows, which cannot ask it to end, skips the test."""

    def __init__(
        self, package: Path | None, *options: str, env: dict[str, str] | None = None, probe: Path | None = None
    ) -> None:
        if sys.platform == "win32":
            pytest.skip("ends a server by SIGTERM")
        files = [] if package is None else [str(package)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.probe, self._forgotten = probe, 0
        if probe is not None:
            environment["PAUSES"] = str(probe)
        # A file, which can be read while the server runs and never fills up as a pipe does.
        self._printed = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 - as long as the server
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", COMMAND, *files, "--port", "0", "--threads", "1", *options],
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        while not (match := re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log)):
            if self.process.poll() is not None:
                with self._printed:
                    raise RuntimeError("the server did not start:\n" + self.log)
            time.sleep(0.02)
        self.port = int(match.group(1))

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return Path(self._printed.name).read_text()

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()

    def predict(
        self, body: Any, content_type: str, path: str = "/predict", **headers: str
    ) -> tuple[int, dict[str, Any]]:
        status, content = self.request("POST", path, body, {"Content-Type": content_type, **headers})
        return status, json.loads(content)

    def metric(self, name: str, path: str = "/metrics") -> float:
        _, text = self.request("GET", path)
        found = re.search(rf"^{re.escape(name)} (\S+)$", text.decode(), re.MULTILINE)
        assert found, name
        return float(found.group(1))

    def pauses(self) -> tuple[float, float]:
        """The longest that anything has kept the event loop, in seconds of the processor and of the clock."""
        assert self.probe is not None
        processor, clock = self.probe.read_text().split()[1:3]
        return float(processor), float(clock)

    def memory(self, name: str = "VmRSS") -> float:
        """MiB of the web process: now, or with ``VmHWM`` at most since `forget`."""
        text = (proc(self.process.pid) / "status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", text).group(1)) / 1024  # type: ignore[union-attr]

    def forget(self) -> None:
        """Begin anew with the most memory, and the longest pause so far."""
        assert self.probe is not None
        (proc(self.process.pid) / "clear_refs").write_text("5")
        self._forgotten += 1
        self.process.send_signal(signal.SIGUSR1)
        while not (self.probe.exists() and int(self.probe.read_text().split()[0]) == self._forgotten):
            time.sleep(0.01)

    def stop(self, patience: float = 60) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(patience)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self._printed.close()


@contextlib.contextmanager
def running(package: Path | None, *options: str, **more: Any) -> Iterator[Server]:
    server = Server(package, *options, **more)
    try:
        yield server
    finally:
        server.stop()


def workers_of(pid: int, module: bytes = b"serve.worker") -> list[int]:
    """Process ids of the model's processes below a server, or of those that read bodies (``serve.decoder``)."""
    found = []
    for entry in proc().iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and module in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def image(seed: int = 0, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def warned_of() -> bytes:
    """A PNG of whose notes of the camera Pillow warns: they end too early."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(image())).save(out, "PNG", exif=b"II*\0\x08\0\0\0\1\0")
    return out.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG whose header says this, whatever the compressed ``rows`` hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def many_scans(count: int, side: int = 1024) -> bytes:
    """A progressive JPEG of so many scans, each of a few bytes that say that all blocks are zero."""

    def scan(place: int, bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        packed = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
        return b"\xff\xda\0\x08\1\1\0" + bytes([place, 63 * (place > 0), 0]) + packed

    def table(kind: int, symbol: int) -> bytes:
        return b"\xff\xc4\0\x14" + bytes([kind, 1, *bytes(15), symbol])

    blocks = (side // 8) ** 2
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + b"\1\x11\0"
    start = b"\xff\xd8\xff\xdb\0\x43\0" + b"\1" * 64 + frame + table(0, 0) + table(16, 0xE0) + scan(0, "0" * blocks)
    return start + scan(1, "011111111111111") * (count - 1) + b"\xff\xd9"


def form(field: str, content: bytes, boundary: str = "frontier") -> tuple[bytes, str]:
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="a.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + content + f"\r\n--{boundary}--\r\n".encode()  # fmt: skip
    return body, f"multipart/form-data; boundary={boundary}"


async def acall(
    app: Any,
    method: str,
    path: str,
    headers: dict[str, str],
    chunks: list[bytes],
    pause: float = 0.0,
    watch: Callable[[], object] = lambda: None,
    sent: list[dict[str, Any]] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Call an ASGI application without a server; ``pause`` seconds, and ``watch``, before every chunk of the body."""
    waiting = list(chunks)
    messages: list[dict[str, Any]] = [] if sent is None else sent

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        watch()
        if waiting:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    path, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": query.replace(" ", "%20").encode(), "root_path": "",
        "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        "headers": [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in messages[1:])
    status = messages[0]["status"]
    return status, {key.decode(): value.decode() for key, value in messages[0]["headers"]}, body


class _Unhurried(asyncio.SelectorEventLoop):
    """Its clock moves only while nothing is to be done: no machine is too busy for a time limit."""

    now = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._plain, self._selector.select = self._selector.select, self._select  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now

    def _select(self, timeout: float | None = None) -> Any:
        events = self._plain(None if timeout is None else 0)
        if not events:
            self.now += timeout or 0
        return events


def unhurried(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run`, of what waits for nothing but time."""
    loop = _Unhurried()
    with contextlib.closing(loop):
        return loop.run_until_complete(coroutine)


def call(*args: Any, **more: Any) -> tuple[int, dict[str, str], bytes]:
    """`acall`, in an event loop of its own whose clock a busy machine does not move."""
    status, headers, body = unhurried(acall(*args, **more))
    return status, headers, body


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
