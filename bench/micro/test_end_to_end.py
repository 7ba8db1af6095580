"""How many images a second, with and without uncertainty?"""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro import benchmarks, end_to_end

NAMES = [
    "network alone", "fastgrad, last layer", "fastgrad, whole network", "fastgrad, three signals",
    "gradient per sample",
]  # fmt: skip


@pytest.mark.parametrize(("case", "name"), benchmarks.parameters(end_to_end.cases, NAMES))
def test_end_to_end(benchmark: Any, case: str, name: str) -> None:
    benchmarks.run(benchmark, end_to_end.cases, case, name)
