"""A name, the file that answers under it, and how a new version of the file takes over.

A file is copied before anything is read from it, so that workers load what was checked, also after a restart. When the
workers of a new version are ready, it gets new requests; the old version ends after its last answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastgrad.checks import Array
from fastgrad.deploy.file.package import PackageError, read_description
from fastgrad.deploy.file.reading import digest_of, without_waiting
from fastgrad.deploy.serve.bodies import Limits
from fastgrad.deploy.serve.child import LOG, Child, ChildError
from fastgrad.deploy.serve.metrics import Metrics
from fastgrad.deploy.serve.pool import Pool

#: Prefix of the names of folders with copies.
_PREFIX = "fastgrad-serve-"


def _own_folder() -> tuple[Path, Any]:
    """Remove folders of killed processes; return a new one, and the file whose lock ends with this process."""
    new, lock = Path(tempfile.mkdtemp(prefix=_PREFIX)), None
    with contextlib.suppress(ImportError, OSError):  # Windows, and file systems without locks
        import fcntl

        for left in Path(tempfile.gettempdir()).glob(_PREFIX + "*/lock"):
            with contextlib.suppress(OSError), open(left, "rb", opener=without_waiting) as found:
                fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left.parent)
        lock = open(new / "new", "wb")  # noqa: SIM115 - as long as the process
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Locked before it gets the name by which other servers find it.
        os.rename(new / "new", new / "lock")
    return new, lock


def _remove(folder: Path, lock: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        lock.close()


class Served:
    """One version of a file, with its processes and metrics; the arguments are those of `create_app`.

    PackageError if it is not an exported model or too large, or if its SHA-256 is not among the ``digests``, if given.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, workers: int = 1, threads: int | None = None, max_batch: int = 32,
        batch_wait: float = 0.002, limits: Limits = Limits(), false_alarm_rate: float | None = None,  # noqa: B008 - frozen
        drift_false_alarm_rate: float = 0.01, digests: Collection[str] = (),
    ) -> None:  # fmt: skip
        folder, lock = _own_folder()
        self._remove = weakref.finalize(self, _remove, folder, lock)
        self.path, self.copy = str(path), (copy := folder / Path(path).name)
        try:
            # Of the copy, before anything else reads it: the file itself may change at any time.
            self.digest = digest_of(path, copy, limits.file)
            if digests and self.digest not in digests:
                raise PackageError(f"{path} must have the SHA-256 {' or '.join(digests)}; it was {self.digest}")
            self.description = description = read_description(copy)
        except (PackageError, OSError) as error:
            raise self._failure(error) from None
        self.threshold = description.threshold_at(false_alarm_rate)
        self.false_alarm_rate = false_alarm_rate or description.false_alarm_rate
        self.metrics = metrics = Metrics(
            description,
            false_alarm_rate=None if self.threshold is None else self.false_alarm_rate,
            drift_false_alarm_rate=drift_false_alarm_rate,
        )
        max_batch = min(max_batch, description.max_batch)
        module, most = "fastgrad.deploy.serve.worker", 8 * description.columns * max_batch + 2**16
        self.pool = pool = Pool(
            [Child(module, (str(copy), threads), most=most, folder=folder) for _ in range(workers)],
            max_batch=max_batch, batch_wait=batch_wait, on_batch=metrics.batch_size.observe,
            hang_timeout=limits.seconds, load_timeout=limits.load_seconds,
        )  # fmt: skip
        metrics.gauge("queue_length", "Inputs that wait for a worker", lambda: len(pool.queue))
        metrics.gauge("worker_restarts", "Worker processes replaced since the start", lambda: pool.restarts)
        self._users = 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Served]:
        """Keep this version running while one request is answered."""
        self._users += 1
        try:
            yield self
        finally:
            self._users -= 1

    async def run(self, value: bytes) -> Array:
        """Return the row of one input from `decoder`."""
        return np.frombuffer(await self.pool.submit(value))

    async def start(self) -> None:
        """Start the processes; PackageError if they cannot load the file."""
        try:
            await self.pool.start()
        except ChildError as error:
            self._remove()
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> PackageError:
        """Return the error with the path of the file instead of the copy's."""
        said = getattr(error, "strerror", None) or str(error).replace(str(self.copy), self.path)
        return PackageError(said if self.path in said else f"{self.path} cannot be loaded: {said}")

    async def retire(self) -> None:
        """End after the last answer."""
        while self._users:
            await asyncio.sleep(0.05)
        await self.pool.close()
        self._remove()


class Model:
    """The file that answers under one name; ``served`` is its latest version, which gets new requests."""

    def __init__(self, name: str, path: Path, **options: Any) -> None:
        self.name, self.path, self._options = name, path, options
        self.reloads = self.failures = 0
        self.served = self._version()
        self._retiring: list[asyncio.Task[None]] = []

    def _version(self) -> Served:
        version = Served(self.path, **self._options)
        gauge = version.metrics.gauge
        gauge("model_reloads", "Files that took over since the start", lambda: self.reloads)
        gauge("model_reload_failures", "Files that could not be loaded since the start", lambda: self.failures)
        return version

    async def reload(self) -> None:
        """Load the file again and let it take over; if that fails, log why and continue."""
        try:
            fresh = await asyncio.to_thread(self._version)
            # Loading the same content again would reset the drift monitor and its alarm.
            if fresh.digest == self.served.digest:
                LOG.info("model %s: %s is what it was", self.name, self.path)
                return
            await fresh.start()
        except Exception as error:
            self.failures += 1
            LOG.error("model %s stays as it was: %s", self.name, error)
            return
        self._retiring = [task for task in self._retiring if not task.done()]
        self._retiring.append(asyncio.create_task(self.served.retire()))
        self.served = fresh
        self.reloads += 1
        LOG.info("model %s: %s was loaded", self.name, self.path)

    async def close(self) -> None:
        """Answer the requests accepted by this version and earlier ones, then end."""
        await asyncio.gather(self.served.retire(), *self._retiring)
