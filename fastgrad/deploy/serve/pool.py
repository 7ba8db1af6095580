"""Processes behind one queue: batches form while they are busy, and a killed process loses no input.

The inputs of a dead process or a failed batch are run again, one at a time, so that none fails because of another.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

from anyio import move_on_after

from fastgrad.deploy.serve.child import LOG, Bytes, Child, ChildDiedError, ChildTimeoutError, RequestError

MAX_ATTEMPTS = 3


@dataclass(eq=False)
class _Item:
    parts: Sequence[Bytes]
    future: asyncio.Future[bytes]
    attempts: int = 0


@dataclass(eq=False)
class Pool:
    """Has processes answer inputs in batches; ``on_batch`` is called with the size of each.

    An idle process waits ``batch_wait`` seconds after the first input for its batch to fill. A process is replaced if
    it does not answer within ``hang_timeout`` seconds, and must start within ``load_timeout`` seconds.
    """

    workers: Sequence[Child]
    _: KW_ONLY
    hang_timeout: float
    load_timeout: float
    max_batch: int = 1
    batch_wait: float = 0.0
    on_batch: Callable[[int], None] = lambda size: None

    def __post_init__(self) -> None:
        self.restarts = 0  # how often a process was replaced
        self.queue: deque[_Item] = deque()
        self._arrived = asyncio.Event()
        for worker in self.workers:
            worker.on_end = self._arrived.set
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether at least one process can take a batch."""
        return any(worker.alive for worker in self.workers)

    async def start(self) -> None:
        """Start all processes; ChildError if one cannot do its work."""
        try:
            await asyncio.gather(*(worker.start(self.load_timeout) for worker in self.workers))
        except BaseException:
            await self.close()
            raise
        self._tasks = [asyncio.create_task(self._serve(worker)) for worker in self.workers]

    async def submit(self, *parts: Bytes) -> bytes:
        """Return the reply to one input, given in parts. Cancelling this takes the input out of the queue.

        RequestError if it is refused, or failed for a reason that is in the log. ChildDiedError if its process ended
        repeatedly or did not answer in time.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.queue.append(_Item(parts, future))
        self._arrived.set()
        try:
            return await future
        finally:
            del future  # else an error and this frame keep each other, and the input with them

    async def close(self) -> None:
        """End the processes; the caller must have awaited all submitted inputs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    async def _serve(self, worker: Child) -> None:
        while True:
            if batch := await self._next_batch(worker):
                await self._run(worker, batch)
                # While no input arrives, the last batch must not fill the memory.
                del batch
            if not worker.alive:
                self.restarts += 1
                await worker.restart(self.load_timeout)

    async def _next_batch(self, worker: Child) -> list[_Item]:
        """Wait for an input, and briefly for more; an input that was run before comes first and alone.

        A process that ends meanwhile gets an empty batch, so that no input is blamed for its end.
        """
        while worker.alive and not self.queue:
            self._arrived.clear()
            await self._arrived.wait()
        if self.max_batch > 1:
            with move_on_after(self.batch_wait):
                while self.queue and len(self.queue) < self.max_batch and not self.queue[0].attempts:
                    self._arrived.clear()
                    await self._arrived.wait()
        if not worker.alive:
            LOG.warning("a process is replaced: it ended while it waited")
            return []
        most = 1 if self.queue and self.queue[0].attempts else self.max_batch
        batch: list[_Item] = []
        while self.queue and len(batch) < most:
            item = self.queue.popleft()
            # The future is done if its request timed out or was cancelled.
            if not item.future.done():
                batch.append(item)
        return batch

    async def _run(self, worker: Child, batch: list[_Item]) -> None:
        try:
            self.on_batch(len(batch))
            reply = await worker.ask([part for item in batch for part in item.parts], self.hang_timeout)
        except Exception as error:
            if isinstance(error, ChildDiedError):
                LOG.warning("a process is replaced: %s", error)
            elif not isinstance(error, RequestError):
                LOG.exception("a batch of %d failed", len(batch), exc_info=error)
                error = RequestError(500, "the server failed on this input; its log says why")
            self._give_back(batch, error)
        else:
            size = len(reply) // len(batch)
            for number, item in enumerate(batch):
                if not item.future.done():
                    item.future.set_result(reply[number * size : (number + 1) * size])

    def _give_back(self, batch: list[_Item], error: RequestError | ChildDiedError) -> None:
        for item in reversed(batch):
            item.attempts += 1
            final = len(batch) == 1 and isinstance(error, RequestError | ChildTimeoutError)
            if not final and item.attempts < MAX_ATTEMPTS:
                self.queue.appendleft(item)
            elif not item.future.done():
                error = error if final else ChildDiedError(f"its process ended {item.attempts} times")
                item.future.set_exception(error.with_traceback(None))
        self._arrived.set()
