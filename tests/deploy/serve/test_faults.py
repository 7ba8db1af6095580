"""Slow, for each kind of file: fuzzed bodies, thousands of requests checked, killed workers, SIGTERM under load."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("PIL")

from serve_client import Server, form, image, running, wait_for, workers_of

from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import ModelPackage

pytestmark = pytest.mark.slow


class Load:
    """Connections that send numbered images and check each answer against the direct call."""

    def __init__(self, server: Server, package: Path, path: str = "/predict", images: int = 40) -> None:
        self.server, self.path = server, path
        model = ModelPackage(package)
        self.contents = [image(i, (8 + i % 5, 9)) for i in range(images)]
        inputs = [decode_image(content, model.description) for content in self.contents]
        self.expected = [float(model(x[None]).uncertainty) for x in inputs]
        assert len({round(value, 6) for value in self.expected}) == images  # a swap would show
        self.lock = threading.Lock()
        self.right = self.wrong = self.unavailable = self.lost = self.refused = 0
        self.stop = threading.Event()

    def client(self, number: int, requests: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        for i in range(requests):
            if self.stop.is_set():
                break
            index = (number * 7919 + i) % len(self.contents)
            sent = False
            try:
                if connection.sock is None:
                    connection.connect()
                connection.request("POST", self.path, self.contents[index], {"Content-Type": "image/png"})
                sent = True
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                with self.lock:
                    # An answer that began and broke off, or no answer at all to a request that was sent.
                    if sent and not isinstance(error, (http.client.RemoteDisconnected, ConnectionResetError)):
                        self.lost += 1
                    else:
                        self.refused += 1
                if isinstance(error, ConnectionRefusedError):
                    break
                continue
            with self.lock:
                if response.status == 503:
                    self.unavailable += 1
                elif response.status == 200 and np.isclose(
                    json.loads(content)["uncertainty"], self.expected[index], rtol=1e-5, atol=1e-5
                ):
                    self.right += 1
                else:
                    self.wrong += 1
        connection.close()

    def counts(self) -> str:
        """In words."""
        return (
            f"{self.right} right, {self.wrong} wrong or swapped, {self.lost} lost, {self.refused} turned away, "
            f"{self.unavailable} told 503"
        )

    def start(self, connections: int, requests: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=self.client, args=(i, requests)) for i in range(connections)]
        for thread in threads:
            thread.start()
        return threads


@pytest.fixture(scope="module")
def server(model_file: Path) -> Iterator[Server]:
    with running(model_file, "--workers", "2") as started:
        yield started


def test_thousands_of_requests_none_lost_none_swapped(server: Server, model_file: Path) -> None:
    counts = ("fastgrad_request_seconds_count", "fastgrad_batch_size_sum")
    before = [server.metric(name) for name in counts]
    load = Load(server, model_file)
    for thread in load.start(32, 125):
        thread.join()
    assert (load.right, load.wrong, load.lost, load.refused, load.unavailable) == (4000, 0, 0, 0, 0)
    assert [server.metric(name) for name in counts] == [count + 4000 for count in before]
    print(f"{model_file.suffix}: {load.counts()}")


def test_killed_workers_under_load_lose_nothing(server: Server, model_file: Path) -> None:
    before = server.metric("fastgrad_worker_restarts")
    load = Load(server, model_file)
    threads = load.start(16, 200)
    killed = 0
    for share in (0.1, 0.3, 0.5):
        wait_for(lambda share=share: load.right >= 3200 * share or load.wrong, 120)
        os.kill(random.choice(workers_of(server.process.pid)), signal.SIGKILL)
        killed += 1
    for thread in threads:
        thread.join()
    assert (load.right, load.wrong, load.lost, load.refused, load.unavailable) == (3200, 0, 0, 0, 0)

    def back() -> bool:
        # That an idle worker is gone shows when its next batch comes.
        assert server.predict(image(), "image/png")[0] == 200
        return len(workers_of(server.process.pid)) == 2

    wait_for(back)
    assert 1 <= server.metric("fastgrad_worker_restarts") - before <= killed
    print(f"{model_file.suffix}: {killed} killed; {load.counts()}")


def test_sigterm_under_load_finishes_what_was_accepted(model_file: Path) -> None:
    server = Server(model_file)
    load = Load(server, model_file)
    threads = load.start(16, 100_000)
    wait_for(lambda: load.right >= 500, 60)
    before = time.monotonic()
    assert server.stop() == 0
    seconds = time.monotonic() - before
    assert seconds < 20
    for thread in threads:
        thread.join()
    # Connections that were idle or new at that moment were turned away; no answer was wrong or broken off.
    assert (load.wrong, load.lost) == (0, 0)
    assert load.right >= 500
    print(f"{model_file.suffix}: {load.counts()}; {seconds:.1f} s to finish")
    assert workers_of(server.process.pid) == []


def mutated(rng: random.Random, seeds: list[tuple[bytes, str]]) -> tuple[bytes, str]:
    body, kind = rng.choice(seeds)
    content = bytearray(body)
    for _ in range(rng.randint(1, 12)):
        choice = rng.randrange(5)
        place = rng.randrange(len(content) + 1)
        if choice == 0:
            content[place:place] = rng.randbytes(rng.randint(1, 30))
        elif choice == 1:
            del content[place : place + rng.randint(1, 60)]
        elif choice == 2 and content:
            content[place % len(content)] ^= 1 << rng.randrange(8)
        elif choice == 3:
            content[place:] = b""
        else:
            content[place:place] = content[: rng.randint(0, 100)]
    if rng.random() < 0.1:
        kind = rng.choice(
            ["", "image/", "a/b", "application/json", "multipart/form-data; boundary=", "image/png; x=\xff"]
        )
    return bytes(content), kind


def test_ten_thousand_fuzzed_bodies(server: Server, model_file: Path) -> None:
    rng = random.Random(2024)
    inputs = json.dumps({"inputs": torch.randn(3, 8, 8).tolist()}).encode()
    seeds = [
        *(
            (image(1, (20, 20), kind), f"image/{kind.lower()}")
            for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
        ),
        form("file", image(2)),
        (inputs, "application/json"),
        (b'{"inputs": [[1, 2], [3, 4]]}', "application/json"),
    ]
    counts: Counter[int] = Counter()
    workers = sorted(workers_of(server.process.pid))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for _ in range(10_000):
        body, kind = mutated(rng, seeds)
        connection.request("POST", "/predict", body, {"Content-Type": kind})
        response = connection.getresponse()
        answer = json.loads(response.read())
        counts[response.status] += 1
        if response.status != 200:
            assert 400 <= response.status < 500, (response.status, answer, kind, body[:200])
            assert isinstance(answer["detail"], str)
            assert answer["detail"]
    connection.close()
    assert server.predict(image(), "image/png")[0] == 200
    assert sorted(workers_of(server.process.pid)) == workers
    print(f"{model_file.suffix}: {dict(sorted(counts.items()))}")
    assert counts.total() == 10_000
