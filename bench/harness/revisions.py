"""The same benchmark on two revisions of fastgrad, in one run.

The other revision is checked out to a worktree of its own, and *this* checkout's benchmarks run against its package
in a second process. The processes take turns, twice each, and each result keeps the samples of both turns, so that a
machine that drifts does not favour either.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness.case import Result

ROOT = Path(__file__).parents[2]


def compare(revision: str, words: list[str]) -> list[Result]:
    """Run a command for the working tree and for a revision; the latter's names end in ``@ REVISION``.

    Args:
        revision: Anything git can resolve.
        words: What follows ``python``: a module of this checkout that writes its results to ``--samples FILE``.

    Raises:
        ValueError: git does not know the revision.
    """
    known = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if known.returncode:
        raise ValueError(f"--against must name a revision that git knows; it was {revision!r}")
    with tempfile.TemporaryDirectory() as folder:
        tree, link = Path(folder) / "tree", Path(folder) / "bench-only"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(tree), known.stdout.strip()], cwd=ROOT, check=True
        )  # fmt: skip
        try:
            link.mkdir()
            (link / "bench").symlink_to(ROOT / "bench")
            runs: dict[str, list[list[Result]]] = {"": [], f" @ {revision}": []}
            for turn in range(2):
                for suffix, package in (("", ROOT), (f" @ {revision}", tree)):
                    out = Path(folder) / f"samples{turn}{len(suffix)}.json"
                    _child(words, out, [link, package])
                    runs[suffix].append([Result(**r) for r in json.loads(out.read_text())])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return _pooled(runs[""], "") + [
        r
        for r in _pooled(runs[f" @ {revision}"], f" @ {revision}")
        if r.implementation.startswith("fastgrad")
    ]


def _child(words: list[str], out: Path, path: list[Path]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    subprocess.run(
        [sys.executable, *words, "--samples", str(out)],
        cwd=out.parent, env=environment, check=True,
    )  # fmt: skip


def _pooled(turns: list[list[Result]], suffix: str) -> list[Result]:
    """One list of results with the samples of all turns."""
    first = [dataclasses.replace(r, implementation=_named(r.implementation, suffix)) for r in turns[0]]
    for result, *others in zip(first, *turns[1:], strict=True):
        for other in others:
            result.times = result.times + other.times
    return first


def _named(implementation: str, suffix: str) -> str:
    return implementation + suffix if implementation.startswith("fastgrad") else implementation
