"""A case whose implementations each run in a process of their own, and still take turns.

A C library's allocator keeps or returns memory depending on everything the process did before. Of two runs over large
tensors, one that follows a peer with small ones may find its pages mapped already and take a tenth less time than in a
process that does nothing else. Programs train or extract; they do not also run four peers. So each implementation of a
whole-network case gets a fresh process, in which it has run alone when it is timed, and one process at a time works
while the others wait. A turn starts with one call that is not counted (unless a call takes over `LONG`): it finds
the caches, and the pages that a virtual machine has handed back to its host, as the process before left them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.harness import measure, memory
from bench.harness.case import Case, Result
from bench.harness.clock import WallClock, clock

#: Seconds of a call that is its own warm-up.
LONG = 1.0


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a process finds its case: a call that can be sent to it and makes all cases again, and threads."""

    cases: Callable[[], Iterable[Case]]
    threads: int


class Worker:
    """One implementation in its process; calling it runs the implementation."""

    def __init__(self, source: Source, case: str, implementation: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, source, case, implementation), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, *words: Any) -> Any:
        """Send a request and wait for the answer."""
        self._pipe.send(words)
        return self._pipe.recv()

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(("stop",))
        self._process.join(30)
        if self._process.is_alive():
            self._process.terminate()
        self._pipe.close()


class _Turns(WallClock):
    """The workers' own clocks: what travels between processes is not part of a sample."""

    def __call__(self, call: Any, calls: int) -> float:
        """See `bench.harness.clock.Clock`."""
        return float(call.ask("time", calls))


def _serve(pipe: Connection, source: Source, case: str, implementation: str) -> None:
    """A worker's process: check the implementation, then run it on request."""
    torch.set_num_threads(source.threads)
    warnings.simplefilter("ignore")
    found = next(c for c in source.cases() if c.name == case)
    item = next(i for i in found.implementations() if i.name == implementation)
    result = Result(found.name, item.name, found.relative_to, False)
    call, timer, latest = measure.gate(item, result), clock("cpu"), 0.0
    while True:
        words = pipe.recv()
        if words[0] == "stop":
            return
        if words[0] == "result":
            pipe.send(result)
        elif words[0] == "time":
            if call is not None:
                if latest < LONG:
                    call()
                latest = timer(call, words[1])
            pipe.send(latest)
        else:
            pipe.send(memory.peak_bytes(call, "cpu") if call is not None else 0)


@contextlib.contextmanager
def _workers(source: Source, case: Case) -> Iterator[list[tuple[Result, Worker]]]:
    """A worker for each implementation, checked one after the other."""
    started: list[tuple[Result, Worker]] = []
    try:
        for item in case.implementations():
            worker = Worker(source, case.name, item.name)
            started.append((Result(case.name, item.name, case.relative_to, False), worker))
            started[-1] = (worker.ask("result"), worker)
        yield started
    finally:
        for _, worker in started:
            worker.stop()


def run_case(case: Case, source: Source, budget_s: float) -> list[Result]:
    """Like `bench.harness.measure.run_case`, every implementation in its own process.

    Args:
        case: The case, one of those that ``source`` describes.
        source: How a process builds the case again.
        budget_s: As for `bench.harness.measure.run_case`.
    """
    with _workers(source, case) as started:
        ready = [(result, worker) for result, worker in started if result.correct]
        measure.take_turns(ready, _Turns(), budget_s)
        for result, worker in ready:
            result.peak_bytes = worker.ask("memory")
        return [result for result, _ in started]
