"""Worker processes behind one queue: batches form while workers are busy, and a killed worker loses nothing.

What a dead worker held is run again, each input alone: one that kills its worker takes no other with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgrad.deploy.serve.child import Bytes, Child, ChildDiedError

MAX_ATTEMPTS = 3
Row = NDArray[np.float64]
_log = logging.getLogger("uvicorn.error")


class ModelError(RuntimeError):
    """The model cannot be loaded, failed on an input, or its worker died on it repeatedly."""


@dataclass(eq=False)
class _Item:
    value: Bytes
    future: asyncio.Future[Row]
    on_run: Callable[[int], None]
    attempts: int = 0


class WorkerPool:
    """Runs inputs through ``workers`` processes in batches.

    Args:
        path: the exported model.
        columns: numbers in a row of `ModelPackage.rows`.
        workers: number of processes.
        max_batch: largest batch.
        batch_wait: seconds an idle worker waits for a batch to fill after its first input.
        threads: compute threads of each process; None leaves PyTorch's default.
        hang_timeout: seconds after which a worker that does not answer is ended and replaced.
        load_timeout: seconds in which a worker must have loaded the model.
        on_batch: called with the size of every batch.
    """

    def __init__(
        self,
        path: str,
        columns: int,
        *,
        workers: int = 1,
        max_batch: int = 32,
        batch_wait: float = 0.002,
        threads: int | None = None,
        hang_timeout: float = 30.0,
        load_timeout: float = 300.0,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        if max_batch < 1 or workers < 1:
            raise ValueError(f"max_batch and workers must be at least 1; they were {max_batch} and {workers}")
        self.max_batch, self.batch_wait, self.on_batch = max_batch, batch_wait, on_batch
        self.hang_timeout, self.load_timeout = hang_timeout, load_timeout
        self._columns = columns
        self._queue: deque[_Item] = deque()
        self._arrived = asyncio.Event()
        self.workers = [
            Child("fastgrad.deploy.serve.worker", (path, threads), most=8 * columns * max_batch + 2**16)
            for _ in range(workers)
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self._in_flight = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether at least one worker can take a batch."""
        return any(worker.alive for worker in self.workers)

    @property
    def restarts(self) -> int:
        """How often a worker was replaced."""
        return sum(max(0, worker.starts - 1) for worker in self.workers)

    @property
    def queued(self) -> int:
        """Inputs that wait for a worker."""
        return len(self._queue)

    async def start(self) -> None:
        """Start all workers.

        Raises:
            ModelError: the model cannot be loaded.
        """
        started = await asyncio.gather(
            *(worker.start(self.load_timeout) for worker in self.workers), return_exceptions=True
        )
        for outcome in started:
            if isinstance(outcome, tuple) and not outcome[0]:
                continue
            await self.close()
            if isinstance(outcome, BaseException) and not isinstance(outcome, ChildDiedError):
                raise outcome
            reason = outcome[1].decode("utf-8", "replace") if isinstance(outcome, tuple) else outcome
            raise ModelError(f"the model cannot be loaded: {reason}")
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._serve(worker)) for worker in self.workers]

    async def submit(self, value: Bytes, on_run: Callable[[int], None] = lambda size: None) -> Row:
        """Run one input; return its row of `ModelPackage.rows`. Cancelling it takes it out of the queue.

        Args:
            value: as `decoder.read_input` gives it.
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
        await asyncio.gather(*(worker.stop() for worker in self.workers))

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

    async def _serve(self, worker: Child) -> None:
        while True:
            # Requests may have gone away while the batch was forming.
            batch = [item for item in await self._next_batch() if not item.future.done()]
            if not batch:
                continue
            try:
                rows = await self._run(worker, batch)
            except ChildDiedError as error:
                _log.warning("a worker of the model is replaced: %s", error)
                self._give_back(batch)
                await worker.restart(self.load_timeout)
            except Exception as error:
                _log.exception("a batch of %d failed", len(batch), exc_info=error)
                for item in batch:
                    _settle(item, ModelError("the model failed on this input; the server's log says why"))
            else:
                for item, row in zip(batch, rows, strict=True):
                    _settle(item, row)

    async def _run(self, worker: Child, batch: list[_Item]) -> Row:
        self.on_batch(len(batch))
        for item in batch:
            item.on_run(len(batch))
        status, reply = await worker.ask([item.value for item in batch], self.hang_timeout)
        if status:
            raise ModelError(reply.decode("utf-8", "replace"))
        return np.frombuffer(reply, "<f8").reshape(len(batch), self._columns)

    def _give_back(self, batch: list[_Item]) -> None:
        for item in reversed(batch):
            item.attempts += 1
            if item.attempts >= MAX_ATTEMPTS:
                _settle(item, ModelError(f"the model's process ended {item.attempts} times on this input"))
            else:
                self._queue.appendleft(item)
        self._arrived.set()


def _settle(item: _Item, outcome: Row | Exception) -> None:
    if item.future.done():
        return
    if isinstance(outcome, Exception):
        item.future.set_exception(outcome)
    else:
        item.future.set_result(outcome)
