"""Run the sanitizer on every case; the exit status is 1 if it found a fault.

python -m bench.gpu.sanitize             # everything: some minutes
python -m bench.gpu.sanitize --save      # also bench/results/sanitize.json and sanitize.md
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


def main() -> int:
    from bench.gpu.sanitize.checks import run
    from bench.report import pages

    parser = argparse.ArgumentParser(prog="bench.gpu.sanitize", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", help="checks and cases whose name contains this")
    parser.add_argument("--save", action="store_true", help="write bench/results/sanitize.json and sanitize.md")
    options = parser.parse_args()
    if options.save and options.only:
        parser.error("--save writes the whole table: leave out --only")
    rows = run(False, options.only)
    faults = sum(row["fault"] is not None for row in rows)
    print(f"{len(rows)} checks, {faults} faults")
    if options.save:
        pages.save("sanitize", rows, packages=("torch", "triton"))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
