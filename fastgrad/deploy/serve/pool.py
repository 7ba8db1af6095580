"""Worker processes behind one queue: batches form while workers are busy, and a killed worker loses nothing.

Inference has no side effects, so what a dead worker held is simply run again: its inputs return to the head
of the queue, each to be run alone, so that one input that kills its worker cannot take others with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgrad.deploy.serve import worker as worker_module

MAX_ATTEMPTS = 3
Array = NDArray[Any]


class ModelError(RuntimeError):
    """The model failed on an input, or its worker died on it repeatedly."""


class WorkerDiedError(RuntimeError):
    """The worker process ended, or hung and was ended."""


@dataclass(eq=False)
class _Item:
    value: Array
    future: asyncio.Future[tuple[Any, ...]]
    on_run: Callable[[int], None]
    attempts: int = 0


@dataclass(eq=False)
class _Worker:
    """One process and the thread that talks to it."""

    path: str
    threads: int | None
    hang_timeout: float
    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    process: BaseProcess | None = None
    pipe: Connection | None = None
    ready: bool = False

    def start(self) -> None:
        """Start the process and wait until the model is loaded (blocking)."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=worker_module.main,
            args=(theirs, self.path, self.threads),
            daemon=True,
            name="fastgrad-model",
        )
        self.process.start()
        theirs.close()
        try:
            status, reason = self.pipe.recv()
        except (EOFError, OSError):
            raise WorkerDiedError("the model's process ended while it was loading the model") from None
        if status != "ready":
            raise ModelError(f"the model cannot be loaded: {reason}")
        self.ready = True

    def run(self, batch: Array) -> list[Array]:
        """Send one batch and wait for its `answer.results` (blocking)."""
        assert self.pipe is not None
        try:
            self.pipe.send(batch)
            if not self.pipe.poll(self.hang_timeout):
                raise WorkerDiedError(f"the model did not answer within {self.hang_timeout:g} s")
            status, result = self.pipe.recv()
        except (EOFError, OSError):
            raise WorkerDiedError("the model's process ended") from None
        if status != "done":
            raise ModelError(f"the model failed: {result}")
        arrays: list[Array] = result
        return arrays

    def stop(self, patience: float = 5.0) -> None:
        """End the process, kindly first (blocking)."""
        self.ready = False
        if self.pipe is not None:
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            self.pipe.close()
        if self.process is not None:
            self.process.join(patience)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()


class WorkerPool:
    """Runs inputs through ``workers`` processes in batches.

    Args:
        path: the exported model.
        workers: number of processes.
        max_batch: largest batch.
        batch_wait: seconds an idle worker waits for a batch to fill after its first input.
        threads: compute threads of each process; None leaves PyTorch's default.
        hang_timeout: seconds after which a worker that does not answer is replaced.
        on_batch: called with the size of every batch.
    """

    def __init__(
        self,
        path: str,
        *,
        workers: int = 1,
        max_batch: int = 32,
        batch_wait: float = 0.002,
        threads: int | None = None,
        hang_timeout: float = 60.0,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.max_batch, self.batch_wait, self.on_batch = max_batch, batch_wait, on_batch
        self.restarts = 0
        self._queue: deque[_Item] = deque()
        self._arrived = asyncio.Event()
        self._workers = [_Worker(path, threads, hang_timeout) for _ in range(workers)]
        self._tasks: list[asyncio.Task[None]] = []
        self._in_flight = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether at least one worker can take a batch."""
        return any(worker.ready for worker in self._workers)

    @property
    def queued(self) -> int:
        """Inputs that wait for a worker."""
        return len(self._queue)

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [w.process.pid for w in self._workers if w.process and w.process.pid and w.process.is_alive()]

    async def start(self) -> None:
        """Start all workers.

        Raises:
            ModelError: the model cannot be loaded.
            WorkerDiedError: a worker ended while loading it.
        """
        loop = asyncio.get_running_loop()
        started = await asyncio.gather(
            *(loop.run_in_executor(worker.executor, worker.start) for worker in self._workers),
            return_exceptions=True,
        )
        for outcome in started:
            if isinstance(outcome, BaseException):
                await self.close()
                raise outcome
        self._tasks = [loop.create_task(self._serve(worker)) for worker in self._workers]

    async def submit(
        self, value: Array, on_run: Callable[[int], None] = lambda size: None
    ) -> tuple[Any, ...]:
        """Run one input; return its row of `answer.results`. Cancelling it takes it out of the queue.

        Args:
            value: ``input_shape``.
            on_run: called with the size of its batch when that goes to a worker, again where it has to be run again.

        Raises:
            ModelError: the model failed on it.
        """
        item = _Item(value, asyncio.get_running_loop().create_future(), on_run)
        self._queue.append(item)
        self._in_flight += 1
        self._idle.clear()
        self._arrived.set()
        try:
            return await item.future
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def close(self) -> None:
        """Finish what was submitted, then end the workers. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._tasks:
            await self._idle.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(w.executor, w.stop) for w in self._workers))
        for worker in self._workers:
            worker.executor.shutdown(wait=False)

    async def _next_batch(self) -> list[_Item]:
        batch: list[_Item] = []
        deadline = None
        while True:
            while self._queue and len(batch) < self.max_batch:
                if batch and self._queue[0].attempts:
                    return batch
                item = self._queue.popleft()
                if item.future.done():
                    continue  # its request timed out or went away
                batch.append(item)
                if item.attempts:
                    return batch
            if len(batch) >= self.max_batch:
                return batch
            if not self._queue:
                self._arrived.clear()
            if not batch:
                await self._arrived.wait()
                continue
            deadline = deadline or time.monotonic() + self.batch_wait
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return batch
            try:
                await asyncio.wait_for(self._arrived.wait(), remaining)
            except asyncio.TimeoutError:
                return batch
            except asyncio.CancelledError:
                self._queue.extendleft(reversed(batch))
                raise

    async def _serve(self, worker: _Worker) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Requests may have gone away while the batch was forming.
            batch = [item for item in await self._next_batch() if not item.future.done()]
            if not batch:
                continue
            stacked = np.stack([item.value for item in batch])
            self.on_batch(len(batch))
            for item in batch:
                item.on_run(len(batch))
            try:
                results = await loop.run_in_executor(worker.executor, worker.run, stacked)
            except WorkerDiedError as error:
                self._give_back(batch, str(error))
                await self._restart(worker)
            except Exception as error:
                for item in batch:
                    _settle(item, ModelError(str(error)))
            else:
                for item, *row in zip(batch, *results, strict=True):
                    _settle(item, tuple(row))

    def _give_back(self, batch: list[_Item], reason: str) -> None:
        for item in reversed(batch):
            item.attempts += 1
            if item.attempts >= MAX_ATTEMPTS:
                _settle(item, ModelError(f"{reason} ({item.attempts} times on this input)"))
            else:
                self._queue.appendleft(item)
        self._arrived.set()

    async def _restart(self, worker: _Worker) -> None:
        loop = asyncio.get_running_loop()
        pause = 0.1
        while True:
            self.restarts += 1
            await loop.run_in_executor(worker.executor, worker.stop, 0.0)
            try:
                await loop.run_in_executor(worker.executor, worker.start)
                return
            except (ModelError, WorkerDiedError, OSError):
                # The file may be in the middle of a replacement, or memory short for a moment.
                await asyncio.sleep(pause)
                pause = min(2 * pause, 5.0)


def _settle(item: _Item, outcome: tuple[Any, ...] | Exception) -> None:
    if item.future.done():
        return
    if isinstance(outcome, Exception):
        item.future.set_exception(outcome)
    else:
        item.future.set_result(outcome)
