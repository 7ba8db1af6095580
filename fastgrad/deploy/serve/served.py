"""A name and the file that answers under it: loaded, watched, and replaced when the file changes.

A file is copied before anything is read of it: what loads is what was checked, now and when a worker starts again. A
changed file is loaded beside the old one. When its workers are ready, new requests go there; the old one ends when the
last of its requests is answered. A file that cannot be loaded changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastgrad.deploy.file.package import PackageError, digest_of, read_description
from fastgrad.deploy.serve.metrics import Metrics
from fastgrad.deploy.serve.pool import WorkerPool

# Of the server, whose command sets it up.
_log = logging.getLogger("uvicorn.error")


class Served:
    """One version of a file, with the processes that run it and its metrics.

    Args:
        path: the ``.pt2`` or ``.onnx``.
        pins: see `create_app`.
        false_alarm_rate: share of in-distribution inputs to flag; None: the file's own.
        max_batch: largest batch; at most the file's own.
        pool: further options of `WorkerPool`.
        drift_false_alarm_rate: of `Metrics`.
        gauges: further ones of `Metrics`.

    Raises:
        PackageError: not an exported model, or one that ``pins`` does not name.
        ValueError: the file has no threshold for that rate.
    """

    pool: WorkerPool

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        pins: str | os.PathLike[str] | None = None,
        false_alarm_rate: float | None,
        max_batch: int,
        pool: dict[str, Any],
        drift_false_alarm_rate: float = 0.01,
        gauges: Mapping[str, tuple[str, Callable[[], float]]] = MappingProxyType({}),
    ) -> None:
        if not Path(path).is_file():
            raise PackageError(f"{path}: there is no such file")
        folder = Path(tempfile.mkdtemp(prefix="fastgrad-serve-"))
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.copy = copy = folder / Path(path).name
        shutil.copyfile(path, copy)
        # Of the copy, and before anything else reads it: the file itself may change at any time.
        if pins is not None and digest_of(copy) not in Path(pins).read_text("utf-8").lower().split():
            raise PackageError(f"{path} is not a file that {pins} names: its SHA-256 is {digest_of(copy)}")
        try:
            self.description = read_description(copy)
        except PackageError as error:
            raise PackageError(str(error).replace(str(copy), str(path))) from None
        self.threshold = self.description.threshold_at(false_alarm_rate)
        self.false_alarm_rate = false_alarm_rate or self.description.false_alarm_rate
        self.metrics = Metrics(
            self.description,
            false_alarm_rate=None if self.threshold is None else self.false_alarm_rate,
            drift_false_alarm_rate=drift_false_alarm_rate,
            gauges={
                "queue_length": ("Inputs that wait for a worker", lambda: self.pool.queued),
                "worker_restarts": ("Worker processes replaced since the start", lambda: self.pool.restarts),
                **gauges,
            },
        )
        self.pool = WorkerPool(
            str(copy), self.description.columns, max_batch=min(max_batch, self.description.max_batch),
            on_batch=self.metrics.batch_size.observe, **pool,
        )  # fmt: skip
        self._users = 0
        self._free = asyncio.Event()
        self._free.set()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Served]:
        """For the time of one request, from its body to its answer."""
        self._users += 1
        self._free.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._free.set()

    async def retire(self) -> None:
        """End when the last request is answered."""
        await self._free.wait()
        await self.pool.close()
        self._remove()


class Model:
    """What answers under one name.

    Args:
        name: for the log.
        path: the file.
        load: makes a `Served` of it.

    Attributes:
        served: what new requests go to.
        reloads: how often a changed file took over.
        failures: how often one could not be loaded.
    """

    def __init__(self, name: str, path: str, load: Callable[[Model], Served]) -> None:
        self.name, self.path, self._load = name, path, load
        self.reloads = self.failures = 0
        self._stamp = _stamp(path)
        self.served = load(self)
        self._retiring: set[asyncio.Task[None]] = set()

    async def watch(self, seconds: float) -> None:
        """Look at the file every so many seconds, for ever."""
        pending = self._stamp
        while True:
            await asyncio.sleep(seconds)
            found = _stamp(self.path)
            if found is None or found == self._stamp:
                continue
            if found != pending:
                # It may be in the middle of being written: look once more.
                pending = found
                continue
            self._stamp = found
            await self.reload()

    async def reload(self) -> None:
        """Load the file anew and let it take over; where that fails, say why and go on."""
        fresh = None
        try:
            fresh = await asyncio.get_running_loop().run_in_executor(None, self._load, self)
            await fresh.pool.start()
        except Exception as error:
            self.failures += 1
            message = "model %s: %s has changed and cannot be loaded: %s; the one before goes on"
            _log.error(message, self.name, self.path, error)
            if fresh is not None:
                await fresh.retire()
            return
        old, self.served = self.served, fresh
        self.reloads += 1
        _log.info("model %s: %s has changed and was loaded", self.name, self.path)
        task = asyncio.get_running_loop().create_task(old.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """Finish what was accepted, by this version and those before."""
        await asyncio.gather(self.served.retire(), *self._retiring)


def _stamp(path: str) -> tuple[int, int, int] | None:
    """What changes with a file; None where there is none at the moment."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
