"""Worker processes: batches, a killed worker, a poisonous input."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anyio import fail_after
from serve_client import image, proc, wait_for
from serve_stub import FakeChild

from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.serve.child import Child, ChildDiedError, ChildError, RequestError
from fastgrad.deploy.serve.decoder import NUMBERS, PIXELS
from fastgrad.deploy.serve.pool import MAX_ATTEMPTS, Pool
from fastgrad.deploy.serve.served import Served


def with_fakes(workers: int, body: Callable[[Pool, list[FakeChild]], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        fakes = [FakeChild() for _ in range(workers)]
        pool = Pool(fakes, hang_timeout=30.0, load_timeout=30.0, **options)  # type: ignore[arg-type]
        await pool.start()
        try:
            return await body(pool, fakes)
        finally:
            await pool.close()

    return asyncio.run(run())


async def submit_all(pool: Pool, values: Sequence[int]) -> list[Any]:
    calls = [pool.submit(bytes([value])) for value in values]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return [np.frombuffer(answer) if isinstance(answer, bytes) else answer for answer in answers]


def test_batches_and_their_answers() -> None:
    sizes: list[int] = []

    async def body(pool: Pool, fakes: list[FakeChild]) -> None:
        answers = await submit_all(pool, range(100))
        assert [row.tolist() for row in answers] == [[0.25] * 4 + [i] for i in range(100)]
        assert sum(sizes) == 100
        assert max(sizes) == 8
        assert len(sizes) <= 20

    with_fakes(2, body, max_batch=8, on_batch=sizes.append)


def test_dead_worker_loses_nothing() -> None:
    async def body(pool: Pool, fakes: list[FakeChild]) -> None:
        fakes[0].die_on = {1, 4}
        answers = await submit_all(pool, range(50))
        assert [row[4] for row in answers] == list(range(50))
        assert pool.restarts == 2

    with_fakes(1, body, max_batch=8)


def test_processes_that_end_while_idle() -> None:
    async def body(pool: Pool, fakes: list[FakeChild]) -> None:
        await asyncio.sleep(0)  # until all wait
        for fake in fakes:
            fake.end()
        assert not pool.ready
        (answer,) = await submit_all(pool, [5])
        assert answer[4] == 5
        for fake in fakes:
            fake.end()
        with fail_after(10):
            while not all(fake.alive for fake in fakes):
                await asyncio.sleep(0)
        assert pool.restarts == 2 * len(fakes)
        assert sum(len(fake.batches) for fake in fakes) == 1

    with_fakes(MAX_ATTEMPTS, body)


def test_poisonous_input_fails_alone() -> None:
    async def body(pool: Pool, fakes: list[FakeChild]) -> None:
        fakes[0].poison = 7
        answers = await submit_all(pool, range(16))
        for i, answer in enumerate(answers):
            if i == 7:
                assert isinstance(answer, ChildDiedError)
                assert f"{MAX_ATTEMPTS} times" in str(answer)
            else:
                assert answer[4] == i
        # After the first death it was run alone.
        assert [batch for batch in fakes[0].batches if 7 in batch][1:] == [[7]] * (MAX_ATTEMPTS - 1)

    with_fakes(1, body, max_batch=16)


def test_failed_batch_is_run_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process ends: the memory lasts for fewer, and one input fails by itself."""

    async def body(pool: Pool, fakes: list[FakeChild]) -> None:
        plain = fakes[0].ask

        async def ask(parts: Sequence[bytes], seconds: float) -> bytes:
            rows = await plain(parts, seconds)
            if len(parts) > 8 or b"\7" in parts:
                raise ChildError("not enough memory")
            return rows

        monkeypatch.setattr(fakes[0], "ask", ask)
        answers = await submit_all(pool, range(16))
        assert isinstance(answers.pop(7), RequestError)
        assert [row[4] for row in answers] == [i for i in range(16) if i != 7]
        assert [len(batch) for batch in fakes[0].batches] == [16] + [1] * 16
        assert pool.restarts == 0

    with_fakes(1, body, max_batch=16)


def test_cancelled_inputs_are_not_run() -> None:
    async def body(pool: Pool, fakes: list[FakeChild]) -> None:
        gone = asyncio.ensure_future(pool.submit(b"\1"))
        kept = asyncio.ensure_future(pool.submit(b"\2"))
        await asyncio.sleep(0)
        gone.cancel()
        assert np.frombuffer(await kept)[4] == 2
        assert fakes[0].batches == [[2]]

    with_fakes(1, body, max_batch=8, batch_wait=0.05)


def test_exception_in_a_callback(caplog: pytest.LogCaptureFixture) -> None:
    async def body(pool: Pool, fakes: list[FakeChild]) -> None:
        with pytest.raises(RequestError, match="log says why"):
            await asyncio.wait_for(pool.submit(b"\1"), 10)
        pool.on_batch = int
        (answer,) = await submit_all(pool, [2])
        assert answer[4] == 2

    def fail(size: int) -> None:
        raise ZeroDivisionError("in a callback")

    with_fakes(1, body, on_batch=fail)
    assert "in a callback" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="stops a process by SIGSTOP")
def test_real_workers(model_file: Path) -> None:
    """One process: load, answer in batches, be killed, come back, hang, be closed."""

    def numbers(rows: list[bytes]) -> np.ndarray:
        return np.stack([np.frombuffer(row) for row in rows])

    async def run() -> None:
        model = ModelPackage(model_file)
        served = Served(model_file, threads=1, max_batch=16)  # whose copy of the file lives as long as it
        pool = served.pool
        await pool.start()
        process = pool.workers[0].process
        values = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        inputs = [NUMBERS + value.numpy().tobytes() for value in values]
        pixels = [PIXELS + bytes([i]) * 192 for i in range(3)]
        first = [asyncio.ensure_future(pool.submit(value)) for value in inputs[:20]]
        await first[0]
        os.kill(process.pid, signal.SIGKILL)
        rows = await asyncio.gather(*first, *(pool.submit(value) for value in inputs[20:] + pixels))
        assert pool.restarts == 1
        expected = [torch.full((3, 8, 8), ((i / 255) - 0.5) / 0.25) for i in range(3)]
        direct = np.concatenate([model.rows(values), model.rows(torch.stack(expected))])
        np.testing.assert_allclose(numbers(rows), direct, rtol=1e-5, atol=1e-5)
        # Stopped in the middle of a batch that no pipe holds: it is ended, and the batch runs elsewhere.
        process = pool.workers[0].process
        os.kill(process.pid, signal.SIGSTOP)
        pool.hang_timeout = 0.5
        hanging = asyncio.gather(*(pool.submit(value) for value in inputs[:16]))
        while pool.workers[0].process is process:
            await asyncio.sleep(0.01)
        pool.hang_timeout = 30.0
        np.testing.assert_allclose(numbers(await hanging), direct[:16], rtol=1e-5, atol=1e-5)
        # Killed while it waits: the pool says so, and it comes back by itself.
        process = pool.workers[0].process
        os.kill(process.pid, signal.SIGKILL)
        with fail_after(60):
            for ready in (True, False):
                while pool.ready == ready:
                    await asyncio.sleep(0.01)
        assert pool.workers[0].process is not process
        await pool.close()
        assert pool.workers[0].process.returncode is not None

    asyncio.run(run())


def test_failed_or_slow_start(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"no")

    async def run() -> None:
        for seconds, reason in ((60.0, "not a readable"), (0.01, "no answer within 0.01 s")):
            child = Child("fastgrad.deploy.serve.worker", (str(tmp_path / "bad.pt2"), None), most=2**20)
            with pytest.raises(ChildError, match=reason):
                await Pool([child], hang_timeout=30.0, load_timeout=seconds).start()
            assert child.process.returncode is not None

    asyncio.run(run())


def test_failed_restart_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        child = Child("no_such_module", (), most=2**20)
        restarting = asyncio.ensure_future(child.restart(60.0))
        with fail_after(60):
            while "tried again" not in caplog.text:
                await asyncio.sleep(0.01)
        restarting.cancel()
        await asyncio.gather(restarting, return_exceptions=True)
        await child.stop()

    asyncio.run(run())
    assert "a process cannot be started: No module named 'no_such_module'; it is tried again" in caplog.text


def test_kill_without_sigkill(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which ends it by any other, and denies that to one that has just ended."""
    sent: list[int] = []
    kill = getattr(signal, "SIGKILL", signal.SIGTERM)

    async def run(child: Child) -> None:
        await child.start(30)

        def end(pid: int, number: int) -> None:
            sent.append(number)
            plain(pid, kill)
            raise PermissionError

        plain = os.kill
        monkeypatch.setattr(os, "kill", end)
        monkeypatch.delattr(signal, "SIGKILL", raising=False)
        with pytest.raises(ChildDiedError, match="no answer within 0 s"):
            await child.ask([b"{}"], 0)
        await child.stop()

    asyncio.run(run(Child("fastgrad.deploy.serve.decoder", (100,), most=2**20)))
    assert sent == [signal.SIGTERM]


def test_reply_that_is_too_long() -> None:
    async def run() -> None:
        child = Child("fastgrad.deploy.serve.decoder", (100,), most=192)
        await child.start(60)
        with pytest.raises(ChildDiedError, match="its reply is too long"):
            await child.ask([b'["image/png", [3, 8, 8], "float32"]\n', image()], 60)
        await child.stop()
        assert not child.alive

    asyncio.run(run())


def test_event_loop_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows has for web servers that reload, or run several processes."""

    async def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    async def run() -> None:
        await Pool([Child("none", (), most=1)], hang_timeout=1.0, load_timeout=1.0).start()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    with pytest.raises(ChildError, match=r"event loop \w+ starts no processes; on Windows ProactorEventLoop does"):
        asyncio.run(run())


def test_process_ends_with_the_server() -> None:
    proc()
    code = """
import asyncio, os
from fastgrad.deploy.serve.child import Child
async def run():
    child = Child("fastgrad.deploy.serve.decoder", (100,), most=2**20)
    await child.start(60)
    print(child.process.pid, flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(run())
"""
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False).stdout)

    def ended() -> bool:
        try:
            # It may wait for whoever inherits it to ask for its status.
            return (proc(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    wait_for(ended)


def test_no_secrets_in_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTGRAD_API_KEY", "k-4711")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "token=k-4711")
    # Some begin like LANG, HOME, TEMP and TORCH.
    for name in ("DATABASE_PASSWORD", "LANGCHAIN_API_KEY", "HOMEBREW_GITHUB_API_TOKEN", "TEMPORAL_API_KEY", "TORCHKEY"):
        monkeypatch.setenv(name, "k-4711")
    monkeypatch.setenv("OMP_DYNAMIC", "FALSE")

    async def run() -> bytes:
        child = Child("fastgrad.deploy.serve.decoder", (100,), most=2**20)
        await child.start(30)
        environment = (proc(child.process.pid) / "environ").read_bytes()
        maps = (proc(child.process.pid) / "maps").read_bytes()
        assert b"torch" not in maps
        await child.stop()
        return environment

    environment = asyncio.run(run())
    assert b"PATH=" in environment
    assert b"OMP_DYNAMIC=FALSE" in environment
    assert b"k-4711" not in environment
