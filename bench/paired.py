"""Time fastgrad at this revision and at another in turns: a paired ratio for each case.

    python -m bench.paired REV                       # quick sizes of all tables
    python -m bench.paired REV --only network --rounds 15

Both run this checkout's cases, each in a process of its own. Ratios are of processor time on one thread; below 1 this
revision takes less time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from bench import clock, registry
from bench.report.pages import printed
from bench.report.text import table

ROOT = Path(__file__).parents[1]


def _begin(package: Path) -> None:
    """Make a new process import the package from a folder; ``bench`` is imported already, from this checkout."""
    sys.path.insert(0, str(package))
    import fastgrad

    if not Path(str(fastgrad.__file__)).is_relative_to(package):
        raise ImportError(f"fastgrad must come from {package}; it came from {fastgrad.__file__}")
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _ready(size: str, case: str, name: str) -> Callable[[], Any]:
    from bench.micro.cases import cases  # imports fastgrad, from the folder that `_begin` chose

    return next(c for c in cases(size) if c.name == case and name in c.names).ready(name, "cpu")


def _seconds(case: tuple[str, str, str], calls: int) -> float:
    return clock.seconds(_ready(*case), calls)


def compare(revision: str, size: str, only: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each of fastgrad's implementations."""
    from bench.micro.cases import cases

    chosen = [
        (case, name) for case in cases(size) for name in case.names
        if name.startswith("fastgrad") and not name.endswith("Triton")
        and any(word in case.table for word in only.split(","))
    ]  # fmt: skip
    pool = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), _begin)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "x"], cwd=tree, check=True, input=archive)
        with pool((ROOT,)) as here, pool((tree,)) as there:
            for case, name in chosen:

                def measure(pool: ProcessPoolExecutor, calls: int, of: Any = (size, case.name, name)) -> float:
                    return pool.submit(_seconds, of, calls).result()

                row = {"table": case.table, "case": case.name, "implementation": name}
                try:
                    # The first calls after another process ran are slow.
                    taken = clock.in_turns([partial(measure, here), partial(measure, there)], rounds, least=2e-2)
                    yield row | clock.rounded_ratio(*taken)
                except Exception as problem:  # the other cases are still worth measuring
                    yield row | {"ratio": f"{type(problem).__name__}: {problem}", "quartiles": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("revision", help="anything git can resolve")
    parser.add_argument("--size", choices=registry.SIZES, default="quick")
    parser.add_argument("--only", default="", metavar="TABLES", help="words of which a table's name has one")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(table(printed(compare(args.revision, args.size, args.only, args.rounds))))


if __name__ == "__main__":
    main()
