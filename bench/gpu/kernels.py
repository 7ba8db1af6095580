"""Each kernel's share of the device's measured rates, from what it must at least read, write and multiply.

python -m bench.gpu.kernels --out DIR [--tiny]     # writes DIR/kernels.json
python -m bench.gpu.kernels --once [--tiny]        # one launch of each, for a profiler or a sanitizer
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import clock
from bench.gpu import compile_cases
from bench.gpu.compile_cases import Case
from bench.gpu.sanitize import cases as small
from bench.report import pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(case: Case, floor: dict[str, Any]) -> dict[str, Any]:
    """Return the median of a case and its shares of the measured rates."""
    result = case.call()
    moved = sum(t.nbytes for t in (*case.inputs, *(result if isinstance(result, tuple) else (result,))))
    taken = clock.deciles(clock.timed(case.call, DEVICE, graph=True, calls=3))
    rate = floor["matrix_per_s"].get(str(case.inputs[0].dtype).removeprefix("torch."))
    return {
        "case": case.name, **taken, "of_copy_rate": moved / taken["median_s"] / floor["copy_bytes_per_s"],
        "of_matrix_rate": 2 * case.products / taken["median_s"] / rate if rate and case.products else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.kernels", description=(__doc__ or "").split("\n", 1)[0])
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path)
    wanted.add_argument("--once", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the small cases that every test run sanitizes")
    options = parser.parse_args()
    made = (small if options.tiny else compile_cases).cases(partial(small.made, device=DEVICE))
    cases = (case for case in made if case.quick)
    if options.once:
        for case in cases:
            case.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return 0
    floor = clock.floor(DEVICE)
    rows, failed = [], False
    for case in cases:
        try:
            rows.append(measure(case, floor))
        except Exception as problem:  # the other kernels are still worth measuring
            failed = True
            print(f"FAILED {case.name}: {type(problem).__name__}: {problem}", file=sys.stderr)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter"
    origin = pages.origin(("torch", "triton"), name)
    pages.store(options.out / "kernels.json", {**origin, "floor": floor, "rows": rows})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
