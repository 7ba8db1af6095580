"""One version of a file, with the processes that answer with it.

A file is copied before anything is read from it, so that processes load what was checked, also when they are replaced.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import weakref
from collections.abc import Collection, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastgrad.checks import extra
from fastgrad.deploy.file.opening import digest_of
from fastgrad.deploy.file.package import PackageError, read_description
from fastgrad.deploy.serve.metrics import Metrics
from fastgrad.deploy.serve.process import Body, Refusal, answers, check, load

with extra("serve"):
    from pebble import CONSTS, ProcessExpired, ProcessPool

#: Seconds to load a model, and bytes of the largest file.
LOAD_SECONDS, LARGEST_FILE = 300.0, 2**30
#: Errors of a process that ended, and of one that took too long; Python 3.10 has two.
SLOW = (TimeoutError, asyncio.TimeoutError)
ENDED = (ProcessExpired, BrokenProcessPool, *SLOW)
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
        """Return the answers; one of `ENDED` if the process has ended, ends or takes too long."""
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
