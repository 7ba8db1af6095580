"""An implementation in a process of its own answers as it would in this one."""

from __future__ import annotations

import functools

from bench.harness import isolated
from bench.selections import cases


def test_worker_checks_times_and_stops() -> None:
    every = functools.partial(cases, "network", "cpu", 0, True)
    source = isolated.Source(every, threads=1)
    case = next(c for c in every() if c.name.startswith("plain CNN"))
    worker = isolated.Worker(source, case.name, "fastgrad")
    try:
        result = worker.ask("result")
        assert result.correct, result.note
        assert (result.case, result.implementation) == (case.name, "fastgrad")
        assert worker.ask("time", 2) > 0
        assert worker.ask("memory") > 0
    finally:
        worker.stop()
    assert not worker._process.is_alive()
