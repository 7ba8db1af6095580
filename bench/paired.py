"""fastgrad at this revision and at another, in turns: a paired ratio of each case.

    python -m bench.paired REV                       # quick sizes of all tables
    python -m bench.paired REV --only network --rounds 15

Both run this checkout's cases, each in a process of its own, as many calls each in turns. Every other turn begins with
the other revision, which is checked out to a temporary worktree. Ratios are of processor time on one thread. A ratio
below 1 says that this revision takes less time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.registry import SIZES, Place, cases
from bench.report.text import table

ROOT = Path(__file__).parents[1]
#: Seconds that a sample lasts at least: the first calls after another process ran are slow.
_LEAST = 2e-2
#: Turns that warm up.
_WARM = 2


class Worker:
    """A process that times calls of one revision of the package."""

    def __init__(self, package: Path, link: Path, size: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.paired", "--worker", size], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=link, env={**os.environ, "PYTHONPATH": f"{link}{os.pathsep}{package}"},
        )  # fmt: skip

    def seconds(self, case: str, name: str, calls: int) -> float:
        """Return the seconds of one of so many calls; raises `RuntimeError` where it is wrong or fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([case, name, calls]), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or '"the process ended"')
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return float(answer)


def processor_seconds(call: Callable[[], Any], calls: int) -> float:
    """Return processor time of a call: what else runs does not count."""
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def work(size: str) -> None:
    """Answer requests from standard input; the latest call stays prepared."""
    torch.set_num_threads(1)
    place, latest, call = Place("cpu"), None, None
    for line in sys.stdin:
        case, name, calls = json.loads(line)
        try:
            if latest != (case, name):
                one = next(c for c in cases(size) if c.name == case and name in c.names)
                call, latest = one.ready(name, place)[0], (case, name)
            assert call is not None
            print(processor_seconds(call, calls), flush=True)
        except Exception as problem:  # the other side is to know
            print(json.dumps(f"{type(problem).__name__}: {problem}"), flush=True)


def compare(revision: str, size: str, only: str, rounds: int) -> list[dict[str, str]]:
    """Return a row for each of fastgrad's implementations."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree, link = Path(folder) / "tree", Path(folder) / "link"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", str(tree), revision], cwd=ROOT, check=True
        )
        link.mkdir()
        (link / "bench").symlink_to(ROOT / "bench")
        named = lambda table: not only or any(word in table for word in only.split(","))  # noqa: E731
        workers = [Worker(package, link, size) for package in (ROOT, tree)]
        try:
            for case in cases(size):
                for name in case.names:
                    if not name.startswith("fastgrad") or name.endswith("Triton") or not named(case.table):
                        continue
                    row = {"table": case.table, "case": case.name, "implementation": name}
                    try:
                        ratios = _ratios(workers, case.name, name, rounds)
                    except RuntimeError as problem:
                        rows.append(row | {"ratio": str(problem), "quartiles": ""})
                        continue
                    low, middle, high = statistics.quantiles(ratios, n=4)
                    rows.append(row | {"ratio": f"{middle:.3f}", "quartiles": f"{low:.3f} to {high:.3f}"})
                    print(rows[-1], file=sys.stderr, flush=True)
        finally:
            for worker in workers:
                worker.process.kill()
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return rows


def _ratios(workers: list[Worker], case: str, name: str, rounds: int) -> list[float]:
    """Return the first worker's time over the second's in each turn."""
    once = min(w.seconds(case, name, 1) for w in workers for _ in range(_WARM))
    calls = max(1, min(1000, int(_LEAST / max(once, 1e-7))))
    ratios = []
    for turn in range(rounds):
        ordered = workers if turn % 2 else workers[::-1]
        taken = {w: w.seconds(case, name, calls) for w in ordered}
        ratios.append(taken[workers[0]] / taken[workers[1]])
    return ratios


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("revision", help="anything git can resolve")
    parser.add_argument("--size", choices=SIZES, default="quick")
    parser.add_argument("--only", default="", metavar="TABLES", help="words of which a table's name has one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.revision)
    else:
        print(table(compare(args.revision, args.size, args.only, args.rounds)))


if __name__ == "__main__":
    main()
