"""Worker processes: batches, a killed worker, a poisonous input."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_echo
import torch
from anyio import fail_after
from serve_client import image, proc, wait_for
from serve_stub import FakeChild

import fastgrad
from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.serve import worker
from fastgrad.deploy.serve.child import Child, ChildDiedError, ChildError, RequestError
from fastgrad.deploy.serve.decoder import NUMBERS, PIXELS
from fastgrad.deploy.serve.pool import MAX_ATTEMPTS, Pool

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def with_fakes(count: int, **options: Any) -> AsyncIterator[tuple[Pool, list[FakeChild]]]:
    """A pool that has started, and its processes, which are none."""
    fakes = [FakeChild() for _ in range(count)]
    pool = Pool(fakes, hang_timeout=30.0, load_timeout=30.0, **options)  # type: ignore[arg-type]
    await pool.start()
    try:
        yield pool, fakes
    finally:
        await pool.close()


async def submit_all(pool: Pool, values: Iterable[int]) -> list[Any]:
    """The last number of each answer, or its exception."""
    answers = await asyncio.gather(*(pool.submit(bytes([value])) for value in values), return_exceptions=True)
    return [np.frombuffer(answer)[-1] if isinstance(answer, bytes) else answer for answer in answers]


async def test_batches_and_their_answers() -> None:
    sizes: list[int] = []
    async with with_fakes(2, max_batch=8, on_batch=sizes.append) as (pool, _):
        assert np.frombuffer(await pool.submit(b"\7")).tolist() == [0.25] * 4 + [7]
        assert await submit_all(pool, range(99)) == list(range(99))
    assert sum(sizes) == 100
    assert max(sizes) == 8
    assert len(sizes) <= 21


async def test_dead_worker_loses_nothing() -> None:
    async with with_fakes(1, max_batch=8) as (pool, fakes):
        fakes[0].die_on = {1, 4}
        assert await submit_all(pool, range(50)) == list(range(50))
        assert pool.restarts == 2


async def test_processes_that_end_while_idle() -> None:
    async with with_fakes(MAX_ATTEMPTS) as (pool, fakes):
        await asyncio.sleep(0)  # until all wait
        for fake in fakes:
            fake.end()
        assert not pool.ready
        assert await submit_all(pool, [5]) == [5]
        for fake in fakes:
            fake.end()
        with fail_after(10):
            while not all(fake.alive for fake in fakes):
                await asyncio.sleep(0)
        assert pool.restarts == 2 * len(fakes)
        assert sum(len(fake.batches) for fake in fakes) == 1


async def test_poisonous_input_fails_alone() -> None:
    async with with_fakes(1, max_batch=16) as (pool, fakes):
        fakes[0].poison = 7
        answers = await submit_all(pool, range(16))
        assert isinstance(failed := answers.pop(7), ChildDiedError)
        assert f"{MAX_ATTEMPTS} times" in str(failed)
        assert answers == [i for i in range(16) if i != 7]
        # After the first death it was run alone.
        assert [batch for batch in fakes[0].batches if 7 in batch][1:] == [[7]] * (MAX_ATTEMPTS - 1)


async def test_failed_batch_is_run_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process ends: the memory lasts for fewer, and one input fails by itself."""
    async with with_fakes(1, max_batch=16) as (pool, fakes):
        plain = fakes[0].ask

        async def ask(parts: Sequence[bytes], seconds: float) -> bytes:
            rows = await plain(parts, seconds)
            if len(parts) > 8 or b"\7" in parts:
                raise ChildError("not enough memory")
            return rows

        monkeypatch.setattr(fakes[0], "ask", ask)
        answers = await submit_all(pool, range(16))
        assert isinstance(answers.pop(7), RequestError)
        assert answers == [i for i in range(16) if i != 7]
        assert [len(batch) for batch in fakes[0].batches] == [16] + [1] * 16
        assert pool.restarts == 0


async def test_refused_input_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the garbage collector, until which refused bodies would fill the memory."""

    async def refuse(parts: Sequence[bytes], seconds: float) -> bytes:
        raise RequestError(422, "not an image")

    async with with_fakes(1) as (pool, fakes):
        monkeypatch.setattr(fakes[0], "ask", refuse)
        body = memoryview(b"body")
        freed = weakref.ref(body)
        gc.disable()
        try:
            with contextlib.suppress(RequestError):
                await pool.submit(body)
            del body
            await asyncio.sleep(0)  # the callback that woke this task holds it until then
            assert freed() is None
        finally:
            gc.enable()


async def test_cancelled_inputs_are_not_run() -> None:
    async with with_fakes(1, max_batch=8, batch_wait=0.05) as (pool, fakes):
        gone = asyncio.ensure_future(pool.submit(b"\1"))
        kept = asyncio.ensure_future(pool.submit(b"\2"))
        await asyncio.sleep(0)
        gone.cancel()
        assert np.frombuffer(await kept)[4] == 2
        assert fakes[0].batches == [[2]]


async def test_exception_in_a_callback(caplog: pytest.LogCaptureFixture) -> None:
    def fail(size: int) -> None:
        raise ZeroDivisionError("in a callback")

    async with with_fakes(1, on_batch=fail) as (pool, _):
        with pytest.raises(RequestError, match="log says why"):
            await asyncio.wait_for(pool.submit(b"\1"), 10)
        pool.on_batch = int
        assert await submit_all(pool, [2]) == [2]
    assert "in a callback" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="stops a process by SIGSTOP")
async def test_process_that_is_killed_or_hangs(tmp_path: Path) -> None:
    """Each time another one starts, and every input is answered."""
    child = Child("serve_echo", (), most=2**10, folder=tmp_path)
    pool = Pool([child], max_batch=16, hang_timeout=30.0, load_timeout=60.0)
    await pool.start()
    first = [asyncio.ensure_future(pool.submit(bytes([value]))) for value in range(20)]
    await first[0]
    os.kill(child.process.pid, signal.SIGKILL)
    rows = await asyncio.gather(*first, *(pool.submit(bytes([value])) for value in range(20, 43)))
    assert [np.frombuffer(row)[4] for row in rows] == list(range(43))
    assert pool.restarts == 1
    # Stopped in the middle of a batch: it is ended, and the batch runs elsewhere.
    process = child.process
    os.kill(process.pid, signal.SIGSTOP)
    pool.hang_timeout = 0.5
    hanging = asyncio.ensure_future(submit_all(pool, range(16)))
    while child.process is process:
        await asyncio.sleep(0.01)
    pool.hang_timeout = 30.0
    assert await hanging == list(range(16))
    # Killed while it waits: the pool says so, and it comes back by itself.
    process = child.process
    os.kill(process.pid, signal.SIGKILL)
    with fail_after(60):
        for ready in (True, False):
            while pool.ready == ready:
                await asyncio.sleep(0.01)
    assert child.process is not process
    assert len(list(tmp_path.iterdir())) == 1
    os.kill(child.process.pid, signal.SIGKILL)
    await pool.close()
    assert child.process.returncode is not None
    assert not list(tmp_path.iterdir())


def test_batch_of_a_worker(model_file: Path) -> None:
    """Numbers that were normalized, and pixels that are not yet."""
    values = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = [NUMBERS + value.numpy().tobytes() for value in values] + [PIXELS + bytes([i]) * 192 for i in range(3)]
    expected = [*values, *(torch.full((3, 8, 8), (i / 255 - 0.5) / 0.25) for i in range(3))]
    rows = np.frombuffer(worker.start(str(model_file), None)(bytearray(b"".join(inputs))))
    direct = ModelPackage(model_file).rows(torch.stack(expected))
    np.testing.assert_allclose(rows.reshape(direct.shape), direct, rtol=1e-5, atol=1e-5)


DECODER = ("fastgrad.deploy.serve.decoder", (100,))


async def test_failed_or_slow_start() -> None:
    for seconds, reason in ((60.0, "takes 0 positional arguments but 1 was given"), (0.01, "no answer within 0.01 s")):
        child = Child("serve_echo", (1,), most=2**20)
        with pytest.raises(ChildError, match=reason):
            await Pool([child], hang_timeout=30.0, load_timeout=seconds).start()
        assert child.process.returncode is not None


async def test_failed_restart_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    child = Child("no_such_module", (), most=2**20)
    restarting = asyncio.ensure_future(child.restart(60.0))
    with fail_after(60):
        while "tried again" not in caplog.text:
            await asyncio.sleep(0.01)
    restarting.cancel()
    await asyncio.gather(restarting, return_exceptions=True)
    await child.stop()
    assert "a process cannot be started: No module named 'no_such_module'; it is tried again" in caplog.text


async def test_kill_without_sigkill(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which ends it by any other, and denies that to one that has just ended."""
    sent: list[int] = []
    plain, kill, child = os.kill, getattr(signal, "SIGKILL", signal.SIGTERM), Child(*DECODER, most=2**20)
    await child.start(30)

    def end(pid: int, number: int) -> None:
        sent.append(number)
        plain(pid, kill)
        raise PermissionError

    monkeypatch.setattr(os, "kill", end)
    monkeypatch.delattr(signal, "SIGKILL", raising=False)
    with pytest.raises(ChildDiedError, match="no answer within 0 s"):
        await child.ask([b"{}"], 0)
    await child.stop()
    assert sent == [signal.SIGTERM]


async def test_reply_that_is_too_long() -> None:
    child = Child(*DECODER, most=192)
    await child.start(60)
    with pytest.raises(ChildDiedError, match="its reply is too long"):
        await child.ask([b'["image/png", [3, 8, 8], "float32"]\n', image()], 60)
    await child.stop()
    assert not child.alive


async def test_event_loop_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows has for web servers that reload, or run several processes."""

    async def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    with pytest.raises(ChildError, match=r"event loop \w+ starts no processes; on Windows ProactorEventLoop does"):
        await Child("none", (), most=1).start(1.0)


def test_process_ends_with_the_server() -> None:
    proc()
    # Without the package's own __init__, which would import PyTorch.
    code = """
import asyncio, os, sys, types
sys.modules["fastgrad"] = types.ModuleType("fastgrad")
sys.modules["fastgrad"].__path__ = [sys.argv[1]]
from fastgrad.deploy.serve.child import Child
async def run():
    child = Child("serve_echo", (), most=2**20)
    await child.start(60)
    print(child.process.pid, flush=True)
    os.kill(os.getpid(), 9)
sys.path.append(sys.argv[2])
asyncio.run(run())
"""
    command = [sys.executable, "-c", code, str(Path(fastgrad.__file__).parent), str(Path(serve_echo.__file__).parent)]
    pid = int(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)

    def ended() -> bool:
        try:
            # It may wait for whoever inherits it to ask for its status.
            return (proc(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    wait_for(ended)


async def test_no_secrets_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some begin like LANG, HOME, TEMP and TORCH.
    for name in ("FASTGRAD_API_KEY", "OTEL_EXPORTER_OTLP_HEADERS", "DATABASE_PASSWORD", "LANGCHAIN_API_KEY",
                 "HOMEBREW_GITHUB_API_TOKEN", "TEMPORAL_API_KEY", "TORCHKEY"):  # fmt: skip
        monkeypatch.setenv(name, "k-4711")
    monkeypatch.setenv("OMP_DYNAMIC", "FALSE")
    child = Child(*DECODER, most=2**20)
    await child.start(30)
    environment, maps = ((proc(child.process.pid) / name).read_bytes() for name in ("environ", "maps"))
    await child.stop()
    assert b"torch" not in maps
    assert b"PATH=" in environment
    assert b"OMP_DYNAMIC=FALSE" in environment
    assert b"k-4711" not in environment
