"""Write ``summary.md`` of a GPU run: the outcome of every step, the floors, each kernel's share of them, the cases.

python -m bench.gpu.summary --out DIR --step NAME=STATUS ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.report.speed import tables
from bench.report.text import environment, table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", action="append", default=[], metavar="NAME=STATUS")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    # A step that failed has left no file.
    found = {path.stem: json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))}
    kernels = found.pop("kernels", None)
    cases = [row for document in found.values() for row in document.get("cases", [])]
    lines = ["# GPU run" + (": dry run, in the interpreter at tiny sizes" if options.dry_run else "")]
    lines += [environment(kernels)] if kernels else []
    outcomes = (dict(zip(("step", "status"), step.split("=", 1), strict=True)) for step in options.step)
    lines += ["## Steps", table(outcomes)]
    if kernels:
        lines += ["## Kernels", table(kernels["rows"])]
    if cases:
        lines += ["## Cases", tables(cases)]
    for path in (options.out / "tests.txt", options.out / "sanitizer.txt"):
        if path.exists():
            tail = "\n".join(path.read_text().splitlines()[-12:])
            lines.append(f"## End of {path.name}\n\n```\n{tail}\n```")
    (options.out / "summary.md").write_text("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
