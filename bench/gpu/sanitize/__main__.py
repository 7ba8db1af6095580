"""Run the sanitizer on every case.

    python -m bench.gpu.sanitize             # everything: some minutes
    python -m bench.gpu.sanitize --quick     # one case for each path of each kernel

Exit status 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    from bench.gpu.sanitize.checks import run

    parser = argparse.ArgumentParser(prog="bench.gpu.sanitize", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one case for each path of each kernel")
    parser.add_argument("--only", default="", help="checks and cases whose name contains this")
    options = parser.parse_args(arguments)
    faults, checked = run(options.quick, options.only, lambda line: print(line, flush=True))
    print(f"{checked} checks, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
