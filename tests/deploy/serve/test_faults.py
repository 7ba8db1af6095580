"""Slow, for each kind of file: thousands of requests checked, killed workers, SIGTERM under load."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_client import Server, image, running, wait_for, workers_of
from serve_load import Load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(model_file: Path) -> Iterator[Server]:
    with running(model_file, "--workers", "2") as started:
        yield started


def test_thousands_of_requests(server: Server, model_file: Path) -> None:
    counts = ("fastgrad_request_seconds_count", "fastgrad_batch_size_sum")
    before = [server.metric(name) for name in counts]
    load = Load(server, model_file)
    for thread in load.start(32, 125):
        thread.join()
    assert (load.right, load.wrong, load.lost, load.refused, load.unavailable) == (4000, 0, 0, 0, 0)
    assert [server.metric(name) for name in counts] == [count + 4000 for count in before]
    print(f"{model_file.suffix}: {load.counts()}")


def test_killed_workers_under_load(server: Server, model_file: Path) -> None:
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


@pytest.mark.parametrize("kept", [True, False], ids=["kept connections", "a connection a request"])
def test_sigterm_under_load(model_file: Path, kept: bool) -> None:
    server = Server(model_file)
    load = Load(server, model_file, keep=kept)
    threads = load.start(16, 100_000)
    wait_for(lambda: load.right >= 500, 60)
    before = time.monotonic()
    assert server.stop() == 0
    seconds = time.monotonic() - before
    assert seconds < 20
    for thread in threads:
        thread.join()
    # A new connection may be refused; one that was made, also while it waited in the listening queue, is answered.
    assert (load.wrong, load.lost, load.cut) == (0, 0, 0)
    assert load.right >= 500
    print(f"{model_file.suffix}: {load.counts()}; {seconds:.1f} s to finish")
    assert workers_of(server.process.pid) == []
