"""Worker processes: batches, a killed worker, a poisonous input."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgrad.deploy.file.package import ModelPackage
from fastgrad.deploy.serve.pool import MAX_ATTEMPTS, ModelError, WorkerDiedError, WorkerPool


class FakeWorker:
    """In place of a process: answers ``2 x``, or dies as told."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.poison: float | None = None
        self.die_on: set[int] = set()
        self.ready = True
        self.process = None

    def start(self) -> None:
        self.ready = True

    def stop(self, patience: float = 0.0) -> None:
        self.ready = False

    def run(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.batches.append(batch.ravel().tolist())
        if self.poison in batch or len(self.batches) in self.die_on:
            raise WorkerDiedError("killed")
        return 2 * batch, batch.ravel()


def with_fakes(
    workers: int, body: Callable[[WorkerPool, list[FakeWorker]], Awaitable[Any]], **options: Any
) -> Any:
    async def run() -> Any:
        pool = WorkerPool("unused", workers=workers, **options)
        fakes = []
        for worker in pool._workers:
            fake = FakeWorker()
            worker.start, worker.stop, worker.run = fake.start, fake.stop, fake.run  # type: ignore[method-assign]
            worker.ready = True
            fakes.append(fake)
        await pool.start()
        try:
            return await body(pool, fakes)
        finally:
            await pool.close()

    return asyncio.run(run())


async def submit_all(pool: WorkerPool, values: list[float]) -> list[Any]:
    calls = [pool.submit(np.array([value])) for value in values]
    return await asyncio.gather(*calls, return_exceptions=True)


def test_every_input_gets_its_own_answer_and_batches_form() -> None:
    sizes: list[int] = []

    async def body(pool: WorkerPool, fakes: list[FakeWorker]) -> None:
        answers = await submit_all(pool, [float(i) for i in range(100)])
        assert [(p.tolist(), u) for p, u in answers] == [([2.0 * i], float(i)) for i in range(100)]
        assert sum(sizes) == 100
        assert max(sizes) == 8
        assert len(sizes) <= 20

    with_fakes(2, body, max_batch=8, on_batch=sizes.append)


def test_a_dead_worker_loses_nothing() -> None:
    async def body(pool: WorkerPool, fakes: list[FakeWorker]) -> None:
        fakes[0].die_on = {1, 4}
        answers = await submit_all(pool, [float(i) for i in range(50)])
        assert [u for _, u in answers] == [float(i) for i in range(50)]
        assert pool.restarts == 2

    with_fakes(1, body, max_batch=8)


def test_a_poisonous_input_fails_alone() -> None:
    async def body(pool: WorkerPool, fakes: list[FakeWorker]) -> None:
        fakes[0].poison = 7.0
        answers = await submit_all(pool, [float(i) for i in range(16)])
        for i, answer in enumerate(answers):
            if i == 7:
                assert isinstance(answer, ModelError)
                assert f"{MAX_ATTEMPTS} times" in str(answer)
            else:
                assert answer[1] == float(i)
        # After the first death it was run alone.
        assert [batch for batch in fakes[0].batches if 7.0 in batch][1:] == [[7.0]] * (MAX_ATTEMPTS - 1)

    with_fakes(1, body, max_batch=16)


def test_cancelled_inputs_are_not_run_and_close_finishes_the_rest() -> None:
    async def body(pool: WorkerPool, fakes: list[FakeWorker]) -> None:
        gone = asyncio.ensure_future(pool.submit(np.array([1.0])))
        kept = asyncio.ensure_future(pool.submit(np.array([2.0])))
        await asyncio.sleep(0)
        gone.cancel()
        await pool.close()
        assert kept.done()
        assert kept.result()[1] == 2.0
        assert fakes[0].batches == [[2.0]]

    with_fakes(1, body, batch_wait=0.05)


def test_real_workers(model_file: Path) -> None:
    """One process: load, answer in batches, be killed, come back, be closed."""

    async def run() -> None:
        pool = WorkerPool(str(model_file), threads=1, max_batch=16)
        await pool.start()
        (pid,) = pool.pids
        values = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
        first = [asyncio.ensure_future(pool.submit(value)) for value in values[:20]]
        await first[0]
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*first, *(pool.submit(value) for value in values[20:]))
        assert pool.restarts == 1
        assert pool.pids != [pid]
        await pool.close()
        assert pool.pids == []
        direct = ModelPackage(model_file)(torch.from_numpy(values))
        np.testing.assert_allclose([u for _, u in answers], direct.uncertainty.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.stack([p for p, _ in answers]), direct.probabilities.numpy(), rtol=1e-5)

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"no")

    async def run() -> None:
        with pytest.raises(ModelError, match="cannot be loaded"):
            await WorkerPool(str(tmp_path / "bad.pt2")).start()

    asyncio.run(run())
