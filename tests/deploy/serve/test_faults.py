"""Slow, for each kind of file: thousands of answers checked under kills, reloads and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
from serve_client import Server, running, wait_for
from serve_load import Load

pytestmark = pytest.mark.slow


def kill_all(server: Server) -> None:
    for pid in server.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def change(file: Path, number: int) -> None:
    """Another file of the same model, so that a reload loads it."""
    new = file.with_name(f"new{file.suffix}")
    if file.suffix == ".onnx":
        import onnx

        model = onnx.load(file)
        kept = [entry for entry in model.metadata_props if entry.key == "fastgrad"]
        del model.metadata_props[:]
        model.metadata_props.extend([*kept, onnx.StringStringEntryProto(key="number", value=str(number))])
        onnx.save(model, new)
    else:
        shutil.copyfile(file, new)
        with zipfile.ZipFile(new, "a") as archive:
            archive.comment = b"%d" % number
    new.replace(file)


@pytest.mark.parametrize("workers", [1, 2])
def test_kills_reloads_and_sigterm_under_load(model_file: Path, workers: int, tmp_path: Path) -> None:
    """All processes are killed three times, those that load as well; two other files take over; then it ends."""
    file = shutil.copyfile(model_file, tmp_path / model_file.name)
    server = Server(file, "--workers", str(workers), "--timeout", "120")
    load = Load(server, model_file)
    threads = load.start(16, 100_000)
    for number, share in enumerate((0.1, 0.4, 0.7)):
        wait_for(lambda share=share: load.right >= 4000 * share or load.wrong, 300)
        kill_all(server)
        time.sleep(random.uniform(0, 3))
        kill_all(server)  # those that replace them may be loading
        if number < 2:
            change(file, number)
            before = server.log.count("was loaded")
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda before=before: server.log.count("was loaded") > before, 120)
    wait_for(lambda: load.right >= 4000 or load.wrong, 300)
    reloads, restarts = (server.metric(f"fastgrad_{name}") for name in ("model_reloads", "worker_restarts"))
    before = time.monotonic()
    assert server.stop() == 0
    seconds = time.monotonic() - before
    for thread in threads:
        thread.join()
    print(
        f"{file.suffix}, {workers} workers: {load.counts()}; {restarts:.0f} processes replaced; {seconds:.1f} s to end"
    )
    assert load.right >= 4000
    # After the end, a new connection is turned away.
    assert (load.wrong, load.lost, load.cut, load.unavailable) == (0, 0, 0, 0)
    assert reloads == 2
    assert seconds < 20


def test_sigterm_with_a_connection_for_each_request(model_file: Path) -> None:
    server = Server(model_file)
    load = Load(server, model_file, keep=False)
    threads = load.start(16, 100_000)
    wait_for(lambda: load.right >= 500, 60)
    assert server.stop() == 0
    for thread in threads:
        thread.join()
    print(f"{model_file.suffix}: {load.counts()}")
    assert load.right >= 500
    assert (load.wrong, load.lost, load.cut) == (0, 0, 0)


def test_random_kills(model_file: Path) -> None:
    """At any moment: while a process reads a batch, runs it, writes its answers, or loads."""
    with running(model_file, "--workers", "2", "--timeout", "300") as server:
        load = Load(server, model_file)
        threads = load.start(16, 150)
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
        assert (load.right, load.wrong, load.lost, load.cut, load.unavailable) == (2400, 0, 0, 0, 0)
