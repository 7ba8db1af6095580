"""Options of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.registry import SIZES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--size", choices=SIZES, help="of the cases (default: quick, on a GPU gpu)")
    group.addoption("--out", type=Path, metavar="DIR", help="write what is measured to JSON files in DIR, one a table")
    group.addoption("--add", action="store_true", help="keep the files' rows, and add implementations that they lack")
    group.addoption("--threads", type=int, default=2, help="on a CPU (default 2)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Enable timing, which the suite's own configuration disables, for as long as the size allows."""
    options = config.option
    options.size = options.size or ("gpu" if torch.cuda.is_available() else "quick")
    options.benchmark_disable = False
    rounds, seconds = {"tiny": (1, "0.001"), "quick": (5, "0.3")}.get(options.size, (5, "2"))
    options.benchmark_min_rounds, options.benchmark_max_time = rounds, seconds
