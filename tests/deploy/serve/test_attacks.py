"""Whatever arrives: an answer or a 4xx in one sentence, little memory of the web process, and its attention.

The slow form of each attack is larger.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serve_client import Server, image, many_scans, png

#: Of this machine; an answer may quote what was sent, but no path.
FOLDERS = (tempfile.gettempdir(), sys.prefix, str(Path(__file__).parents[3]))
#: MiB that the web process may take above its idle size: what all bodies may have, and a batch that is being sent.
MEMORY = 64 + 4 * 16


@pytest.fixture(scope="module")
def server(servers: dict[str, tuple[Server, Path]]) -> Server:
    """Of one kind: no attack comes as far as the file."""
    return servers["onnx"][0]


def counts(short: int, long: int) -> pytest.MarkDecorator:
    """Parametrize a test with how often it does what it does."""
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.slow)], ids=["short", "long"])


@contextlib.contextmanager
def watched(server: Server, name: str) -> Iterator[None]:
    """Hold the web process to its memory, and ask it like a load balancer meanwhile."""
    assert server.predict(image())[0] == 200
    idle = server.memory()
    server.forget()
    slowest, over = 0.0, threading.Event()

    def others() -> None:
        nonlocal slowest
        while not over.is_set():
            start = time.perf_counter()
            assert server.request("GET", "/health")[0] == 200
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.05)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(others)
        try:
            yield
        finally:
            over.set()
        asking.result()
    peak = server.memory("VmHWM")
    print(f"{name}: {peak:.0f} MiB, {peak - idle:.0f} above idle; /health at most {1000 * slowest:.0f} ms")
    assert peak - idle <= MEMORY
    assert server.predict(image())[0] == 200


def post(server: Server, body: bytes, kind: str) -> int:
    status, answer = server.predict(body, kind)
    assert status == 200 or 400 <= status < 500 or status in (500, 503, 504), (status, answer)
    if status != 200:
        assert 0 < len(answer["detail"]) < 500
        assert not any(folder in answer["detail"] for folder in FOLDERS)
    return status


def at_once(server: Server, bodies: list[tuple[bytes, str]], clients: int) -> Counter[int]:
    with ThreadPoolExecutor(clients) as pool:
        return Counter(pool.map(lambda sent: post(server, *sent), bodies))


@counts(2, 30)
def test_bombs(server: Server, count: int) -> None:
    """Of images and of JSON: none costs more than its time limit, or that of the process that reads it."""
    rows = zlib.compress(bytes((2 * 4000 + 1) * 2500), 9)
    deep = b'{"inputs": ' + b"[" * 2**20 + b"]" * 2**20 + b"}"
    kinds = {
        "16 bits, 10 megapixels": (png(4000, 2500, 16, 0, rows), "image/png", {200}),
        "50 megapixels": (png(7071, 7071, 16, 0, b""), "image/png", {413}),
        # 500 where a busy machine takes longer for a second of computing than a batch may take.
        "5,000 scans": (many_scans(5000, 3000), "image/jpeg", {400, 500}),
        "brackets": (deep, "application/json", {422}),
        "numbers": (b'{"inputs": [' + b"1.0," * (2**21) + b"1]}", "application/json", {422}),
        "digits": (b'{"inputs": [' + b"1" * (15 * 2**20) + b"]}", "application/json", {400}),
    }
    for name, (body, kind, expected) in kinds.items():
        with watched(server, f"{count} bombs of {name}"):
            assert set(at_once(server, [(body, kind)] * count, 4)) <= expected, name
    print(f"{server.metric('fastgrad_worker_restarts'):.0f} processes replaced")


@counts(8, 64)
def test_large_bodies(server: Server, count: int) -> None:
    body = random.Random(0).randbytes(2**20) * 15
    kinds = [(body, "image/png"), (b'{"inputs": [' + b"1.0," * (15 * 2**18) + b"1]}", "application/json"),
             (b"[" * len(body), "application/json")]  # fmt: skip
    with watched(server, f"{count} bodies of 15 MiB"):
        found = at_once(server, (kinds * count)[:count], count)
    print(dict(sorted(found.items())))
    assert set(found) <= {400, 422, 503}
    assert found[503] < count


@counts(200, 10_000)
def test_mutated_bodies(server: Server, count: int) -> None:
    rng, before = random.Random(7), server.processes
    inputs = json.dumps({"inputs": [[[0.5] * 8] * 8] * 3}).encode()
    formats = ("PNG", "PNG", "JPEG", "JPEG", "WEBP", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    seeds = [
        *((image(n, ((8, 8), (61, 40))[n % 2], kind), f"image/{kind.lower()}") for n, kind in enumerate(formats)),
        (inputs, "application/json"), (b'{"inputs": [[1, 2], [3, 4]]}', "application/json"),
    ]  # fmt: skip
    bodies = [mutated(rng, *rng.choice(seeds)) for _ in range(count)]
    with watched(server, f"{count} mutated bodies"):
        found = at_once(server, bodies, 8)
    print(dict(sorted(found.items())))
    assert set(found) <= {200, 400, 413, 415, 422}
    assert found[200] > 0
    assert found[400] > 0
    assert server.processes == before


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
        kind = rng.choice(["", "image/", "other", "application/json", "multipart/form-data", "image/png; x=\xff"])
    return bytes(content) or b"\0", kind
