"""Slow, for each kind of file: thousands of answers checked under kills, reloads and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from serve_client import Server, running, wait_for
from serve_load import Load

pytestmark = pytest.mark.slow


def kill_all(server: Server) -> None:
    for pid in server.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_kills_and_reloads_under_load(model_file: Path, workers: int, tmp_path: Path) -> None:
    """All processes are killed three times, those that load as well; the same file is loaded anew twice."""
    file = shutil.copyfile(model_file, tmp_path / model_file.name)
    with running(file, "--workers", str(workers), "--timeout", "120") as server:
        load = Load(server, file)
        threads = load.start(16, 250)
        for share in (0.1, 0.4, 0.7):
            wait_for(lambda share=share: load.right >= 4000 * share or load.wrong, 300)
            kill_all(server)
            time.sleep(random.uniform(0, 3))
            kill_all(server)  # those that replace them may be loading
            before = server.log.count("was loaded") + server.log.count("is what it was")
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda n=before: server.log.count("was loaded") + server.log.count("is what it was") > n, 120)
        for thread in threads:
            thread.join()
        print(
            f"{model_file.suffix}, {workers} workers: {load.counts()}; {server.metric('fastgrad_worker_restarts'):.0f}"
        )
        assert (load.right, load.wrong, load.lost, load.cut, load.refused, load.unavailable) == (4000, 0, 0, 0, 0, 0)
        wait_for(lambda: len(server.processes) == workers, 60)


@pytest.mark.parametrize("kept", [True, False], ids=["kept connections", "a connection a request"])
def test_sigterm_under_load(model_file: Path, kept: bool) -> None:
    server = Server(model_file)
    load = Load(server, model_file, keep=kept)
    threads = load.start(16, 100_000)
    wait_for(lambda: load.right >= 500, 60)
    before = time.monotonic()
    assert server.stop() == 0
    seconds = time.monotonic() - before
    for thread in threads:
        thread.join()
    # A new connection may be refused; a request that was read is answered.
    assert (load.wrong, load.lost) == (0, 0)
    assert load.cut == 0 or not kept
    assert load.right >= 500
    assert seconds < 20
    print(f"{model_file.suffix}: {load.counts()}; {seconds:.1f} s to finish")


def test_random_kills(model_file: Path) -> None:
    """At any moment: while a process reads a batch, runs it, writes its answers, or loads."""
    with running(model_file, "--workers", "2", "--timeout", "300") as server:
        load = Load(server, model_file)
        threads = load.start(16, 60)
        killed = 0
        while any(thread.is_alive() for thread in threads) and killed < 20:
            time.sleep(random.uniform(0.5, 3))
            for pid in random.sample(server.processes, min(1, len(server.processes))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        for thread in threads:
            thread.join()
        print(f"{model_file.suffix}: {killed} killed; {load.counts()}")
        assert (load.right, load.wrong, load.lost, load.cut, load.unavailable) == (960, 0, 0, 0, 0)
