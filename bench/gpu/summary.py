"""``summary.md`` of a GPU run: every step's outcome, the floors, each kernel's share of them, the cases.

python -m bench.gpu.summary --out DIR --step NAME=STATUS ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.report.speed import tables
from bench.report.text import environment, table


def summary(folder: Path, steps: Sequence[str], dry: bool) -> str:
    """Return the page; a step that failed has left no file."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    kernels = found.pop("kernels", None)
    cases = [row for document in found.values() for row in document.get("cases", [])]
    lines = ["# GPU run" + (": dry run, in the interpreter at tiny sizes" if dry else "")]
    outcomes = table(dict(zip(("step", "status"), step.split("=", 1), strict=True)) for step in steps)
    lines += [environment(kernels)] if kernels else []
    lines += ["## Steps", outcomes]
    if kernels:
        lines += ["## Kernels", table(kernels["rows"])]
    if cases:
        lines += ["## Cases", tables(cases)]
    for path in (folder / "tests.txt", folder / "sanitizer.txt"):
        if path.exists():
            tail = "\n".join(path.read_text().splitlines()[-12:])
            lines.append(f"## End of {path.name}\n\n```\n{tail}\n```")
    return "\n\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", action="append", default=[], metavar="NAME=STATUS")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    (options.out / "summary.md").write_text(summary(options.out, options.step, options.dry_run))


if __name__ == "__main__":
    main()
