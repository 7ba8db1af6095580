"""Processes that answer bodies in batches: none that is killed, hangs or is reloaded loses or swaps an answer.

A file is copied before anything is read from it, so that processes load what was checked, also when they are replaced.
When the processes of a new version are ready, it takes over; the old one ends after its last batch.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastgrad.checks import extra
from fastgrad.deploy.file.package import PackageError, read_description
from fastgrad.deploy.file.reading import digest_of
from fastgrad.deploy.serve.guard import LOG
from fastgrad.deploy.serve.metrics import Metrics
from fastgrad.deploy.serve.process import Body, Refusal, answers, check, load

with extra("serve"):
    from anyio import move_on_after
    from pebble import CONSTS, ProcessExpired, ProcessPool

#: Seconds to load a model, and bytes of the largest file.
LOAD_SECONDS, LARGEST_FILE = 300.0, 2**30
#: Bytes of a batch's bodies, unless a single one has more: while they are sent to a process, they are held twice.
_BATCH_BYTES = 16 * 2**20
#: How often an input runs whose process ends: it may have been killed for another reason.
_TRIES = 3
#: Errors of a process that ended, and of one that took too long; Python 3.10 has two.
_SLOW = (TimeoutError, asyncio.TimeoutError)
_ENDED = (ProcessExpired, BrokenProcessPool, *_SLOW)
#: Processes ignore SIGTERM (`process.load`), so Pebble need not wait for it to have an effect.
CONSTS.term_timeout = 0


class Process:
    """A process that holds a model and does one task at a time: a pool of one, made anew after anything unforeseen.

    Processes that shared a pool would share its pipe, which one of them may leave locked or half written when it dies.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self._arguments = str(path), options
        self._pool: Any = None

    @property
    def alive(self) -> bool:
        """Whether the model is loaded and the process has not ended."""
        return self._pool is not None and bool(self._pool.active)

    async def start(self) -> None:
        """Start, load the model and answer one input; PackageError or another exception if that fails."""
        await self.stop()
        pool = ProcessPool(1, initializer=load, initargs=self._arguments, context=get_context("spawn"))
        try:
            loaded = await asyncio.to_thread(pool.schedule, check)
            await asyncio.wait_for(asyncio.wrap_future(loaded), LOAD_SECONDS)
        except BaseException:
            await _end(pool)
            raise
        self._pool = pool

    async def ask(self, bodies: Sequence[Body], seconds: float) -> list[dict[str, Any] | Refusal]:
        """Return the answers; one of `_ENDED` if the process has ended, ends or takes too long."""
        if not self.alive:
            raise BrokenProcessPool("it ended while it waited")
        task = self._pool.schedule(answers, args=[bodies], timeout=seconds)
        # Pebble's limit holds from when the process has taken the task, which a stopped one never does.
        return list(await asyncio.wait_for(asyncio.wrap_future(task), seconds + 5))

    async def stop(self) -> None:
        """End the process, whatever it is doing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await _end(pool)


async def _end(pool: ProcessPool) -> None:
    pool.stop()  # type: ignore[no-untyped-call]
    await asyncio.to_thread(pool.join)


class Version:
    """One version of a file, with its processes and metrics; the options are those of `create_app`.

    PackageError if it is not an exported model, or if its SHA-256 is not among the ``digests``, if given.
    """

    def __init__(
        self,
        path: Path,
        *,
        workers: int,
        digests: Collection[str],
        drift_false_alarm_rate: float,
        options: dict[str, Any],
    ) -> None:
        folder = tempfile.mkdtemp(prefix="fastgrad-serve-")
        #: Removes the copy, and what processes left beside it.
        self.remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.path, self.copy = path, Path(folder) / path.name
        try:
            # Of the copy, before anything else reads it: the file itself may change at any time.
            self.digest = digest_of(path, self.copy, LARGEST_FILE)
            if digests and self.digest not in digests:
                raise PackageError(f"{path} must have the SHA-256 {' or '.join(digests)}; it was {self.digest}")
            self.description = read_description(self.copy)
            self.threshold = self.description.threshold_at(options["false_alarm_rate"])
        except (PackageError, OSError, ValueError) as error:
            self.remove()
            raise self._failure(error) from None
        rate = options["false_alarm_rate"] or self.description.false_alarm_rate
        self.false_alarm_rate = None if self.threshold is None else rate
        self.metrics = Metrics(self.description, self.false_alarm_rate, drift_false_alarm_rate)
        self.processes = [Process(self.copy, options) for _ in range(workers)]

    @property
    def ready(self) -> bool:
        """Whether a process can take a batch."""
        return any(process.alive for process in self.processes)

    async def start(self) -> None:
        """Start the processes; PackageError if one cannot load the file."""
        try:
            await asyncio.gather(*(process.start() for process in self.processes))
        except Exception as error:
            await self.stop()
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> PackageError:
        """Return the error with the path of the file instead of the copy's."""
        said = getattr(error, "strerror", None) or str(error).replace(str(self.copy), str(self.path))
        return PackageError(said if str(self.path) in said else f"{self.path} cannot be loaded: {said}")

    async def stop(self) -> None:
        """End the processes."""
        await asyncio.gather(*(process.stop() for process in self.processes))
        self.remove()


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

    async def _answer(self, number: int, batch: list[_Waiting], tries: int = _TRIES) -> None:
        """Answer a batch; one that fails runs again, one body at a time, so that none fails because of another."""
        batch = [one for one in batch if not one.future.done()]  # others have run out of time
        if not batch:
            return
        version, found = self.version, None
        version.metrics.batch_size.observe(len(batch))
        try:
            found = await version.processes[number].ask([one.body for one in batch], self._seconds)
        except _ENDED as error:
            slow = isinstance(error, _SLOW)
            LOG.warning("a process is replaced: %s", f"no answer within {self._seconds:g} s" if slow else error)
            await self._replace(version, number)
            tries = tries if len(batch) > 1 else 0 if slow else tries - 1
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
