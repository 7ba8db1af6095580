"""Batches of what waits: no process that is killed, hangs or is reloaded loses or swaps an answer.

When the processes of a new version of the file are ready, it takes over; the old one ends after its last batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

from fastgrad.checks import extra
from fastgrad.deploy.serve.guard import LOG
from fastgrad.deploy.serve.pool import ENDED, SLOW, Version
from fastgrad.deploy.serve.process import Body, Refusal

with extra("serve"):
    from anyio import move_on_after

#: Bytes of a batch's bodies, unless a single one has more: while they are sent to a process, they are held twice.
_BATCH_BYTES = 16 * 2**20
#: How often an input runs whose process ends: it may have been killed for another reason.
_TRIES = 3


@dataclass(eq=False)
class _Waiting:
    body: Body
    future: asyncio.Future[tuple[Version, Any]]


class Batcher:
    """Hands waiting bodies to processes in batches; ``version`` is the one that answers, of which ``first`` is made."""

    def __init__(self, first: Version, *, max_batch: int, seconds: float, **options: Any) -> None:
        self.version, self._options = first, {"path": first.path, "workers": len(first.processes), **options}
        self._most, self._seconds = max_batch, seconds
        self._waiting: deque[_Waiting] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.restarts = self.reloads = self.failures = 0
        self._show(first)

    def _show(self, version: Version) -> None:
        gauge = version.metrics.gauge
        gauge("queue_length", "Inputs that wait for a process", lambda: len(self._waiting))
        gauge("worker_restarts", "Processes replaced since the start", lambda: self.restarts)
        gauge("model_reloads", "Files that took over since the start", lambda: self.reloads)
        gauge("model_reload_failures", "Files that could not be loaded since the start", lambda: self.failures)

    async def start(self) -> None:
        """Start the processes; PackageError if they cannot load the file."""
        # Of this event loop.
        self._arrived, self._reloading = asyncio.Event(), asyncio.Lock()
        self._busy = [asyncio.Lock() for _ in self.version.processes]
        await self.version.start()
        self._tasks = {asyncio.create_task(self._work(number)) for number in range(len(self._busy))}

    async def stop(self) -> None:
        """End the processes; the caller has awaited all answers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.version.stop()

    async def submit(self, body: Body) -> tuple[Version, dict[str, Any] | Refusal]:
        """Return the answer to a body, and the version that gave it. Cancelling this takes it out of the queue."""
        waiting = _Waiting(body, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        try:
            return await waiting.future
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    async def reload(self) -> None:
        """Load the file anew and let it take over when it has answered an input; if that fails, log why and go on.

        Loading the same content again would reset the drift monitor, so it is left if nothing is wrong with it.
        """
        async with self._reloading:
            try:
                fresh = await asyncio.to_thread(Version, **self._options)
                old, processes = self.version, self.version.processes
                if fresh.digest == old.digest and old.copy.exists() and all(process.alive for process in processes):
                    fresh.remove()
                    LOG.info("%s is what it was", old.path)
                    return
                await fresh.start()
            except Exception as error:
                self.failures += 1
                LOG.error("the model stays as it was: %s", error)
                return
            if fresh.digest == old.digest:
                fresh.metrics = old.metrics
            else:
                self._show(fresh)
            self.version = fresh
            self.reloads += 1
            LOG.info("%s was loaded", fresh.path)
            retiring = asyncio.create_task(self._retire(old))
            self._tasks.add(retiring)
            retiring.add_done_callback(self._tasks.discard)

    async def _retire(self, old: Version) -> None:
        for busy in self._busy:
            async with busy:  # it has begun its last batch before
                pass
        await old.stop()

    async def _work(self, number: int) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                with move_on_after(1):
                    await self._arrived.wait()
                async with self._busy[number]:
                    if not self.version.processes[number].alive:  # killed while it waited
                        await self._replace(self.version, number)
            batch, size = [self._waiting.popleft()], 0
            while self._waiting and len(batch) < min(self._most, self.version.description.max_batch):
                size += len(batch[-1].body.content)
                if size + len(self._waiting[0].body.content) > _BATCH_BYTES:
                    break
                batch.append(self._waiting.popleft())
            async with self._busy[number]:
                await self._answer(number, batch)
            batch.clear()  # while no other comes, the last must not fill the memory

    async def _answer(self, number: int, batch: list[_Waiting], tries: int = _TRIES) -> None:
        """Answer a batch; one that fails runs again, one body at a time, so that none fails because of another."""
        batch = [one for one in batch if not one.future.done()]  # others have run out of time
        if not batch:
            return
        version, found = self.version, None
        version.metrics.batch_size.observe(len(batch))
        try:
            found = await version.processes[number].ask([one.body for one in batch], self._seconds)
        except ENDED as error:
            slow = isinstance(error, SLOW)
            LOG.warning("a process is replaced: %s", f"no answer within {self._seconds:g} s" if slow else error)
            await self._replace(version, number)
            # What runs out of time runs once more: its process may have been stopped from outside.
            tries = int(tries > 1) if slow else tries - (len(batch) == 1)
            reason = "this input takes too long, or ends the process that answers it"
        except Exception as error:
            LOG.exception("a batch of %d failed", len(batch), exc_info=error)
            tries, reason = tries * (len(batch) > 1), "the server failed on this input; its log says why"
        if found is None and tries:
            for one in batch:
                await self._answer(number, [one], tries)
            return
        for one, result in zip(batch, found or [Refusal(500, reason)], strict=True):
            if not one.future.done():
                one.future.set_result((version, result))

    async def _replace(self, version: Version, number: int) -> None:
        """Replace a process; try until it has loaded the model, or another version has taken over."""
        self.restarts += 1
        while self.version is version:
            try:
                await version.processes[number].start()
                return
            except Exception as error:
                LOG.warning("a process cannot be started: %s", error)
            if not version.copy.exists():  # such as removed by the system's cleaner of temporary files
                await self.reload()
            if self.version is version:
                await asyncio.sleep(1)
