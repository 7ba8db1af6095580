"""Every case of the registry as an item of pytest-benchmark, checked before it is timed.

pytest bench/micro                                          # quick sizes
pytest bench/micro -k "network and ResNet and fastgrad"
pytest bench/micro --size full -k last-layer --out bench/results
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.registry import Case, cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """An item for each implementation of each case of the size."""
    items = [
        pytest.param(case, name, id=f"{case.table}-{case.name}-{name}")
        for case in cases(metafunc.config.option.size)
        for name in case.names
    ]
    metafunc.parametrize(("case", "name"), items)


def test_micro(
    timed: Callable[[Case, str], dict[str, Any]], peak_memory: Callable[[Case, str], int], case: Case, name: str
) -> None:
    row = timed(case, name)
    row["peak_bytes"] = peak_memory(case, name)
