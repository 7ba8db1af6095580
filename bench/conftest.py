"""Fixtures of the benchmarks: time what is right, measure peak memory, keep what was measured.

pytest bench/micro                                   # every case at the quick size
pytest bench/micro --size full -k "network and ResNet" --out bench/results
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import clock, memory
from bench.registry import SIZES, Case, Place
from bench.report import document

Row = dict[str, Any]
ROWS = pytest.StashKey[list[tuple[str, Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("bench")
    group.addoption("--size", choices=SIZES, help="of the cases (default: quick, on a GPU gpu)")
    group.addoption("--out", type=Path, metavar="DIR", help="add what is measured to the JSON files in DIR")
    group.addoption("--threads", type=int, default=2, help="on a CPU (default 2)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Time, although the suite's own configuration does not, and no longer than the size is worth."""
    options = config.option
    options.benchmark_disable = False
    rounds, seconds = {"tiny": (1, "0.001"), "quick": (5, "0.3")}.get(options.size or "quick", (5, "2"))
    options.benchmark_min_rounds, options.benchmark_max_time = rounds, seconds
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Place:
    """Where all cases run."""
    torch.set_num_threads(request.config.getoption("--threads"))
    # The same setting for every implementation: see the function.
    from fastgrad.engine.memory import keep_freed_memory

    keep_freed_memory()
    return Place("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Any, place: Place, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Time an implementation of a case after its check; one of fastgrad that is wrong fails, a peer is skipped."""

    def run(case: Case, name: str) -> None:
        row = document.row(case, name)
        with warnings.catch_warnings():
            # Peers warn of hooks and missing batching rules; whether their numbers are right is checked.
            warnings.simplefilter("ignore")
            try:
                call, row["error"] = case.ready(name, place)
            except LookupError as absent:
                pytest.skip(str(absent))
            except Exception as problem:  # a peer may refuse a task in any way it likes
                row["note"] = (
                    str(problem)
                    if isinstance(problem, ValueError)
                    else f"{type(problem).__name__}: {problem}"
                )
                request.config.stash[ROWS].append((case.table, row))
                if name.startswith("fastgrad"):
                    raise
                pytest.skip(row["note"])
            benchmark.group = case.name
            if place.device == "cuda":
                _by_events(benchmark, case.implementations(place)[name].graph, call)
            else:
                benchmark(call)
        times = sorted(benchmark.stats.stats.data)
        cut = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
        row |= {"correct": True, "median_s": cut[4], "p10_s": cut[0], "p90_s": cut[8]}
        request.config.stash[ROWS].append((case.table, row))

    return run


def _by_events(benchmark: Any, graph: bool, call: clock.Call) -> None:
    """Have pytest-benchmark read the device's clock instead of the host's."""
    events, spent = clock.EventClock(), [0.0]
    replay = clock.graphed(call) if graph else call

    def once() -> None:
        spent[0] += events(replay)

    benchmark._timer = lambda: spent[0]
    benchmark.pedantic(once, rounds=50, warmup_rounds=1)


@pytest.fixture
def peak_memory(place: Place, request: pytest.FixtureRequest) -> Callable[[str, Case, str], int]:
    """Measure the peak memory of an implementation in a process of its own."""

    def run(size: str, case: Case, name: str) -> int:
        found = memory.of_case(size, case.name, name, place, request.config.getoption("--threads"))
        if request.config.stash[ROWS]:
            request.config.stash[ROWS][-1][1]["peak_bytes"] = found
        return found

    return run


@pytest.fixture(scope="session", autouse=True)
def written(request: pytest.FixtureRequest, place: Place) -> Iterator[None]:
    """Write what was measured at the end."""
    yield
    out = request.config.getoption("--out")
    if out is None or not request.config.stash[ROWS]:
        return
    add = partial(document.add, out, place=place, floor=clock.floor(place.device))
    tables = dict.fromkeys(table for table, _ in request.config.stash[ROWS])
    for table in tables:
        add(table, [row for name, row in request.config.stash[ROWS] if name == table])
