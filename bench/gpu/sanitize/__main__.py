"""Run the sanitizer on every case.

    python -m bench.gpu.sanitize             # everything: some minutes
    python -m bench.gpu.sanitize --quick     # one case for each path of each kernel
    python -m bench.gpu.sanitize --save      # also bench/results/sanitize.json and sanitize.md

Exit status 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    from bench.gpu.sanitize.checks import run

    parser = argparse.ArgumentParser(prog="bench.gpu.sanitize", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one case for each path of each kernel")
    parser.add_argument("--only", default="", help="checks and cases whose name contains this")
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/sanitize.json and sanitize.md"
    )
    options = parser.parse_args(arguments)
    rows = run(options.quick, options.only, lambda line: print(line, flush=True))
    faults = sum(row["fault"] is not None for row in rows)
    print(f"{len(rows)} checks, {faults} faults")
    if options.save:
        save(rows)
    return 1 if faults else 0


def save(rows: list[dict[str, Any]]) -> None:
    """Put rows into the results; those of other checks stay."""
    from bench.report import pages
    from bench.results_file import RESULTS

    path = RESULTS / "sanitize.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {(row["check"], row["case"]) for row in rows}
    kept = [row for row in before if (row["check"], row["case"]) not in fresh]
    pages.save("sanitize", [*kept, *rows], packages=("torch", "triton"))


if __name__ == "__main__":
    sys.exit(main())
