"""How fast is the introspective network's first layer without stored rows?"""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro import benchmarks, rows

NAMES = [
    "fastgrad Triton", "fastgrad eager", "stored rows", "rows written, then linear",
]  # fmt: skip


@pytest.mark.parametrize(("case", "name"), benchmarks.parameters(rows.cases, NAMES))
def test_rows(benchmark: Any, case: str, name: str) -> None:
    benchmarks.run(benchmark, rows.cases, case, name)
