"""Whatever arrives: an answer or a 4xx in one sentence, little memory, and an event loop that is never away for long.

The slow form of each attack is larger; it prints what the documentation's table says.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import tempfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serve_attack import counts, watched
from serve_client import form, image, png, wait_for, workers_of

#: Of this machine; an answer may quote what was sent, but no path.
FOLDERS = (tempfile.gettempdir(), sys.prefix, str(Path(__file__).parents[3]))


@pytest.fixture(scope="module")
def served(shared: dict[str, Any]) -> Any:
    """Of one kind: no attack comes as far as the file."""
    return shared["onnx"]


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


@counts(8, 100)
def test_images_that_decode_to_much(served: Any, count: int) -> None:
    rows = zlib.compress(bytes((2 * 4000 + 1) * 2500), 9)
    with watched(served, f"{count} images of 10 megapixels and 16 bits"):
        found = at_once(served, [(png(4000, 2500, 16, 0, rows), "image/png")] * count, count)
    assert set(found) <= {200, 422, 503, 504}
    assert at_once(served, [(png(7071, 7071, 16, 0, b""), "image/png")] * 8, 8) == {413: 8}


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


def test_stopped_processes(served: Any) -> None:
    def stop(module: bytes, number: int) -> None:
        for pid in workers_of(served.server.process.pid, module):
            os.kill(pid, number)

    decoders = len(workers_of(served.server.process.pid, b"serve.decoder"))
    with watched(served, "processes that are stopped"):
        stop(b"serve.decoder", signal.SIGSTOP)
        # Those that waited for a stopped process are told; for the others there is a new one.
        found = at_once(served, [(image(1, (900, 900)), "image/png")] * 4, 4)
        assert set(found) <= {200, 422}
        assert found[422] >= 1
        stop(b"serve.worker", signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(at_once, served, [(image(1), "image/png")] * 4, 4)
            stop(b"serve.worker", signal.SIGCONT)
            assert waiting.result() == {200: 4}
    wait_for(lambda: len(workers_of(served.server.process.pid, b"serve.decoder")) == decoders)
    assert served.predict(image(), "image/png")[0] == 200
