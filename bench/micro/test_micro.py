"""Every case of the registry as an item of pytest-benchmark, checked before it is timed.

pytest bench/micro                                          # quick sizes
pytest bench/micro -k "network and ResNet and fastgrad"
pytest bench/micro --size full -k last-layer --out bench/results
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.registry import Case, cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """An item for each implementation of each case of the size."""
    size = metafunc.config.getoption("--size") or ("gpu" if torch.cuda.is_available() else "quick")
    items = [
        pytest.param(size, case, name, id=f"{case.table}-{case.name}-{name}")
        for case in cases(size)
        for name in case.names
    ]
    metafunc.parametrize(("size", "case", "name"), items)


def test_micro(
    timed: Callable[[Case, str], None],
    peak_memory: Callable[[str, Case, str], int],
    size: str,
    case: Case,
    name: str,
) -> None:
    timed(case, name)
    assert peak_memory(size, case, name) >= 0
