"""``fastgrad bench``: found in a checkout, whose ``bench`` folder does the measuring and is not installed."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import fastgrad


def _checkout() -> ModuleType | None:
    """``bench.run`` of the checkout this package runs from, or None where it is installed from a wheel."""
    root = Path(fastgrad.__file__).resolve().parents[1]
    if not (root / "bench" / "run.py").exists():
        return None
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastgrad bench``; without a checkout it takes any and explains itself."""
    module = _checkout()
    if module is None:
        parser.add_argument("words", nargs=argparse.REMAINDER, help="needs a checkout")
        return
    module.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure; the exit status of ``bench.run``, or 2 without a checkout."""
    module = _checkout()
    if module is None:
        print(
            "fastgrad bench: the benchmarks are part of the repository, not of the installed package; clone it and run "
            "'pip install -e .[bench]' there",
            file=sys.stderr,
        )
        return 2
    return int(module.run(arguments))
