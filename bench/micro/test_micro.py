"""Every case of the registry as an item of pytest-benchmark, checked before it is timed.

pytest bench/micro                                          # quick sizes
pytest bench/micro -k "network and ResNet and fastgrad"
pytest bench/micro --size full -k last-layer --out bench/results
pytest bench/micro --size full -k "network and (fastgrad or dattri)" --out bench/results --add
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import clock
from bench.micro.cases import cases
from bench.registry import SEED, Case
from bench.report import pages
from fastgrad.memory import keep_freed_memory

PACKAGES = (
    "torch", "triton", "numpy", "torchvision", "backpack-for-pytorch", "opacus", "pytorch-ood", "dattri-llm", "bergson"
)  # fmt: skip
Rows = dict[str, list[dict[str, Any]]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make an item for each implementation of each case of the size."""
    items = [
        pytest.param(case, name, id=f"{case.table}-{case.name}-{name}")
        for case in cases(metafunc.config.option.size)
        for name in case.names
    ]
    metafunc.parametrize(("case", "name"), items)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(request.config.option.threads)
    # The same setting for every implementation: see the function.
    keep_freed_memory()
    # PyTorch's default for convolutions on a GPU leaves three digits, in a training step too.
    torch.backends.cudnn.allow_tf32 = False
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, device: str) -> Iterator[Rows]:
    """Collect the measured rows by table, and write them to the tables' files at the end."""
    found: Rows = defaultdict(list)
    yield found
    if (out := request.config.option.out) is not None:
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        head = {**pages.origin(PACKAGES, name), "seed": SEED, "floor": clock.floor(device)}
        for table, rows in found.items():
            medians = {(row["case"], row["implementation"]): row["median_s"] for row in rows}
            for row in rows:
                base = medians.get((row["case"], row["relative_to"]))
                row["ratio"] = row["median_s"] / base if row["median_s"] and base else None
            path, document = out / f"{table}.json", {**head, "cases": rows}
            if request.config.option.add:
                document = pages.added(json.loads(path.read_text()), document)
            pages.store(path, document)


# Peers warn about hooks and missing batching rules; their numbers are checked anyway.
@pytest.mark.filterwarnings("ignore")
def test_micro(benchmark: Any, device: str, measured: Rows, case: Case, name: str) -> None:
    """Time an implementation. If it is wrong, fastgrad's fails and a peer's is skipped; its row has no times."""
    row: dict[str, Any] = {
        "case": case.name, "implementation": name, "median_s": None, "p10_s": None, "p90_s": None, "peak_bytes": None,
        "relative_to": case.against, "ratio": None, "correct": False, "note": "", "error": None,
    }  # fmt: skip
    try:
        if name not in case.implementations(device):
            pytest.skip(f"{case.name} has no {name}")
        call, row["error"], row["covered"] = case.checked(name, device)
    except Exception as problem:  # a peer may refuse a task in any way it likes
        row["note"] = f"{problem}" if isinstance(problem, ValueError) else f"{type(problem).__name__}: {problem}"
        measured[case.table].append(row)
        if name.startswith("fastgrad"):
            raise
        pytest.skip(row["note"])
    benchmark.group = case.name
    if device == "cuda":
        # The loop of pytest-benchmark would read the host's clock.
        benchmark._mode, stats = "device", benchmark._make_stats(1)
        for seconds in clock.timed(call, device, case.implementations(device)[name].graph):
            stats.update(seconds)
        # A graph hides the launches, by which small batches are bound.
        row["latency_s"] = clock.latency(call)
    else:
        benchmark(call)
    row["peak_bytes"] = clock.peak_bytes(call, device)
    measured[case.table].append(row | {"correct": True, **clock.deciles(benchmark.stats.stats.data)})
