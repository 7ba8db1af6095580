"""fastgrad at this revision and at another, in turns: a paired ratio of each case.

    python -m bench.paired REV                       # quick sizes of all tables
    python -m bench.paired REV --only network --rounds 15

Both run this checkout's cases, each in a process of its own, as many calls each in turns. Every other turn begins with
the other revision, which is unpacked to a temporary folder. Ratios are of processor time on one thread. A ratio
below 1 says that this revision takes less time.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import registry
from bench.clock import rounded_ratio
from bench.report.text import table

ROOT = Path(__file__).parents[1]
#: Seconds that a sample lasts at least: the first calls after another process ran are slow.
_LEAST = 2e-2
#: Turns that warm up.
_WARM = 2


def _begin(package: Path) -> None:
    """Have a new process import the package from a folder; ``bench`` is imported already, from this checkout."""
    sys.path.insert(0, str(package))
    import fastgrad

    if not Path(str(fastgrad.__file__)).is_relative_to(package):
        raise ImportError(f"fastgrad must come from {package}; it came from {fastgrad.__file__}")
    torch.set_num_threads(1)


@functools.lru_cache(maxsize=1)
def _ready(size: str, case: str, name: str) -> Callable[[], Any]:
    return next(c for c in registry.cases(size) if c.name == case and name in c.names).ready(name, "cpu")


def _seconds(size: str, case: str, name: str, calls: int) -> float:
    """Return processor time of one of so many calls: what else runs does not count."""
    call = _ready(size, case, name)
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def compare(revision: str, size: str, only: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each of fastgrad's implementations."""
    pool = functools.partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), _begin)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x"], cwd=tree, check=True, input=archive)
        with pool((ROOT,)) as here, pool((tree,)) as there:
            for case in registry.cases(size):
                if only and not any(word in case.table for word in only.split(",")):
                    continue
                for name in case.names:
                    if not name.startswith("fastgrad") or name.endswith("Triton"):
                        continue
                    row = {"table": case.table, "case": case.name, "implementation": name}
                    try:
                        ratio = _ratios(here, there, (size, case.name, name), rounds)
                        row |= {column: str(value) for column, value in ratio.items()}
                    except Exception as problem:  # the other cases are still worth measuring
                        row |= {"ratio": f"{type(problem).__name__}: {problem}", "quartiles": ""}
                    rows.append(row)
                    print(row, file=sys.stderr, flush=True)
    return rows


def _ratios(
    here: ProcessPoolExecutor, there: ProcessPoolExecutor, case: tuple[str, str, str], rounds: int
) -> dict[str, Any]:
    """Return the first process's time over the second's."""

    def seconds(pool: ProcessPoolExecutor, calls: int) -> float:
        return pool.submit(_seconds, *case, calls).result()

    once = min(seconds(pool, 1) for pool in (here, there) for _ in range(_WARM))
    calls = max(1, min(1000, int(_LEAST / max(once, 1e-7))))
    taken: dict[ProcessPoolExecutor, list[float]] = {here: [], there: []}
    for turn in range(rounds):
        for pool in (here, there) if turn % 2 else (there, here):
            taken[pool].append(seconds(pool, calls))
    return rounded_ratio(taken[here], taken[there])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("revision", help="anything git can resolve")
    parser.add_argument("--size", choices=registry.SIZES, default="quick")
    parser.add_argument("--only", default="", metavar="TABLES", help="words of which a table's name has one")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(table(compare(args.revision, args.size, args.only, args.rounds)))


if __name__ == "__main__":
    main()
