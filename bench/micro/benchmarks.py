"""What the pytest-benchmark files share: one item an implementation and case, checked before it is timed.

pytest bench/micro --benchmark-enable                                   # everything, quick sizes
pytest bench/micro/test_network.py --benchmark-enable -k "ResNet and fastgrad"
FASTGRAD_BENCH_SIZE=full pytest bench/micro --benchmark-enable          # full sizes
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.harness import Case, Implementation

Cases = Callable[[str, str, int], Iterator[Case]]
SIZE = os.environ.get("FASTGRAD_BENCH_SIZE", "quick")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.lru_cache(maxsize=1)
def _built(cases: Cases, name: str) -> list[Implementation]:
    return next(case for case in cases(SIZE, DEVICE, 0) if case.name == name).implementations()


def parameters(cases: Cases, names: list[str]) -> list[Any]:
    """A parameter for each case and implementation; the latter by name, because building them needs the inputs."""
    return [
        pytest.param(case.name, name, id=f"{case.name}-{name}") for case in cases(SIZE, DEVICE, 0) for name in names
    ]  # fmt: skip


def run(benchmark: Any, cases: Cases, case: str, name: str) -> None:
    """Check an implementation, then time it; skipped where the case has none of that name or the peer refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [item for item in _built(cases, case) if item.name == name]
        if not found:
            pytest.skip(f"{case} has no {name}")
        item = found[0]
        try:
            call = item.prepare()
            error = float(item.check(call()))
        except Exception as problem:  # whatever a peer refuses a task with
            if name.startswith("fastgrad"):
                raise
            pytest.skip(f"{name} does not accept the task: {type(problem).__name__}: {problem}")
        if error > item.tolerance:
            if name.startswith("fastgrad"):
                pytest.fail(f"relative error {error:.1e}, allowed {item.tolerance:.1e}")
            pytest.skip(f"{name} is not correct: relative error {error:.1e}")
        benchmark.group = case
        benchmark.extra_info["error"] = error
        timed = call if DEVICE == "cpu" else functools.partial(_finished, call)
        benchmark.pedantic(timed, rounds=5, iterations=1, warmup_rounds=1)


def _finished(call: Callable[[], Any]) -> None:
    call()
    torch.cuda.synchronize()
