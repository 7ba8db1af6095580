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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def proc(pid: int | str = "") -> Path:
    """What Linux says of processes, or of one; the test is skipped on other systems."""
    if not sys.platform.startswith("linux"):
        pytest.skip("looks at processes in /proc")
    return Path("/proc") / str(pid)


class Server:
    """``fastgrad serve`` on a free port; Windows, which cannot ask it to end, skips the test."""

    def __init__(self, file: Path, *options: str, env: dict[str, str] | None = None) -> None:
        if sys.platform == "win32":
            pytest.skip("ends a server by SIGTERM")
        # A file, which can be read while the server runs and never fills up as a pipe does.
        self._printed = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 - as long as the server
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "fastgrad", "serve", str(file), "--port", "0", "--threads", "1", *options],
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
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

    def predict(self, body: Any, content_type: str = "image/png", **headers: str) -> tuple[int, dict[str, Any]]:
        status, content = self.request("POST", "/predict", body, {"Content-Type": content_type, **headers})
        return status, json.loads(content)

    def metric(self, name: str) -> float:
        _, text = self.request("GET", "/metrics")
        found = re.search(rf"^{re.escape(name)} (\S+)$", text.decode(), re.MULTILINE)
        assert found, name
        return float(found.group(1))

    @property
    def processes(self) -> list[int]:
        """Process ids of the pool's processes."""
        found = []
        for entry in proc().iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.process.pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found

    def memory(self, name: str = "VmRSS") -> float:
        """MiB of the web process: now, or with ``VmHWM`` at most since `forget`."""
        text = (proc(self.process.pid) / "status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", text).group(1)) / 1024  # type: ignore[union-attr]

    def forget(self) -> None:
        """Begin anew with the most memory so far."""
        (proc(self.process.pid) / "clear_refs").write_text("5")

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
def running(file: Path, *options: str, **more: Any) -> Iterator[Server]:
    server = Server(file, *options, **more)
    try:
        yield server
    finally:
        server.stop()


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


async def acall(
    app: Any, method: str, path: str, headers: dict[str, str], chunks: Sequence[bytes] = (), pause: float = 0.0
) -> tuple[int, dict[str, str], bytes]:
    """Call an ASGI application without a server; ``pause`` seconds before every chunk of the body."""
    waiting, messages = list(chunks), []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        if waiting:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    path, _, query = path.partition("?")
    headers = {"host": "localhost", **headers}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": query.replace(" ", "%20").encode(), "root_path": "",
        "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        "headers": [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in messages[1:])
    sent = {key.decode(): value.decode() for key, value in messages[0]["headers"]}
    return messages[0]["status"], sent, body


def call(*args: Any, **more: Any) -> tuple[int, dict[str, str], bytes]:
    """`acall`, in an event loop of its own."""
    return asyncio.run(acall(*args, **more))


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
