"""What do squared norms of every parameter cost, beside a training step and the peers?"""

from __future__ import annotations

from typing import Any

import pytest

from bench.micro import benchmarks, network

NAMES = [
    "fastgrad", "training step", "forward", "BackPACK BatchL2Grad", "Opacus ghost norms", "vmap(grad)",
    "per-sample loop",
]  # fmt: skip


@pytest.mark.parametrize(("case", "name"), benchmarks.parameters(network.cases, NAMES))
def test_network(benchmark: Any, case: str, name: str) -> None:
    benchmarks.run(benchmark, network.cases, case, name)
