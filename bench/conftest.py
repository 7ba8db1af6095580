"""Fixtures of the benchmarks: time what is right, measure peak memory, keep what was measured.

pytest bench/micro                                   # every case at the quick size
pytest bench/micro --size full -k "network and ResNet" --out bench/results
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import clock, memory, registry
from bench.report import pages

PACKAGES = ("torch", "triton", "numpy", "torchvision", "backpack-for-pytorch", "opacus", "pytorch-ood")
Row = dict[str, Any]
#: What was measured, by table.
ROWS = pytest.StashKey[dict[str, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("bench")
    group.addoption("--size", choices=registry.SIZES, help="of the cases (default: quick, on a GPU gpu)")
    group.addoption("--out", type=Path, metavar="DIR", help="add what is measured to the JSON files in DIR")
    group.addoption("--threads", type=int, default=2, help="on a CPU (default 2)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Time, although the suite's own configuration does not, and no longer than the size is worth."""
    options = config.option
    options.size = options.size or ("gpu" if torch.cuda.is_available() else "quick")
    options.benchmark_disable = False
    rounds, seconds = {"tiny": (1, "0.001"), "quick": (5, "0.3")}.get(options.size, (5, "2"))
    options.benchmark_min_rounds, options.benchmark_max_time = rounds, seconds
    config.stash[ROWS] = {}


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where all cases run."""
    torch.set_num_threads(request.config.option.threads)
    # The same setting for every implementation: see the function.
    from fastgrad.engine.memory import keep_freed_memory

    keep_freed_memory()
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def timed(benchmark: Any, device: str, request: pytest.FixtureRequest) -> Callable[[registry.Case, str], Row]:
    """Time an implementation of a case after its check; one of fastgrad that is wrong fails, a peer is skipped.

    Returns the row, whose times are None where the implementation was not right or did not accept the task.
    """
    rows = request.config.stash[ROWS]

    def run(case: registry.Case, name: str) -> Row:
        row: Row = {
            "case": case.name, "implementation": name, "median_s": None, "p10_s": None, "p90_s": None,
            "peak_bytes": None, "relative_to": case.against, "ratio": None, "correct": False, "error": None, "note": "",
        }  # fmt: skip
        with warnings.catch_warnings():
            # Peers warn of hooks and missing batching rules; whether their numbers are right is checked.
            warnings.simplefilter("ignore")
            try:
                call, row["error"] = case.ready(name, device)
            except LookupError as absent:
                pytest.skip(str(absent))
            except Exception as problem:  # a peer may refuse a task in any way it likes
                kind = "" if isinstance(problem, ValueError) else f"{type(problem).__name__}: "
                row["note"] = f"{kind}{problem}"
                rows.setdefault(case.table, []).append(row)
                if name.startswith("fastgrad"):
                    raise
                pytest.skip(row["note"])
            benchmark.group = case.name
            if device == "cuda":
                _by_events(benchmark, case.implementations(device)[name].graph, call)
            else:
                benchmark(call)
        cut = clock.deciles(benchmark.stats.stats.data)
        row |= {"correct": True, "median_s": cut[4], "p10_s": cut[0], "p90_s": cut[8]}
        rows.setdefault(case.table, []).append(row)
        return row

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
def peak_memory(device: str, request: pytest.FixtureRequest) -> Callable[[registry.Case, str], int]:
    """Measure the peak memory of an implementation in a process of its own."""
    option = request.config.option
    return lambda case, name: memory.of_case(option.size, case.name, name, device, option.threads)


@pytest.fixture(scope="session", autouse=True)
def written(request: pytest.FixtureRequest, device: str) -> Iterator[None]:
    """Add what was measured to the files of the tables at the end."""
    yield
    out, found = request.config.option.out, request.config.stash[ROWS]
    if out is not None and found:
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        facts = {"seed": registry.SEED, "floor": clock.floor(device)}
        for table, rows in found.items():
            pages.add(table, rows, name, packages=PACKAGES, folder=out, facts=facts)
