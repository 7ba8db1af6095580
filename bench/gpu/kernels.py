"""Each kernel's share of the device's measured rates, and its time over the compile report's prediction.

python -m bench.gpu.kernels --out DIR [--tiny]       # writes DIR/kernels.json
python -m bench.gpu.kernels --once [--tiny]          # one launch of each, for a profiler or a sanitizer
python -m bench.gpu.kernels --repeat 10000 [--tiny]  # each result must have the same bits every time
"""

from __future__ import annotations

import argparse
import json
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


def predicted(name: str) -> float | None:
    """Return the microseconds that the compile report predicts for a case on this device, if it does."""
    rows = json.loads((pages.RESULTS / "compile.json").read_text())["rows"]
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability()) if DEVICE == "cuda" else ""
    times = [row.get("us") for row in rows if (row["case"], row["arch"]) == (name, arch)]
    return sum(times) if times and None not in times else None


def bits(result: Any) -> torch.Tensor:
    """Return the bits of a launcher's results in one tensor."""
    return torch.cat([t.flatten().view(torch.int32) for t in (result if isinstance(result, tuple) else (result,))])


def repeats(case: Case, times: int) -> int:
    """Return how many of a case's results differ in a bit from the first."""
    first = bits(case.call())
    return int(sum((bits(case.call()) != first).any().long() for _ in range(times)))


def measure(case: Case, floor: dict[str, Any]) -> dict[str, Any]:
    """Return a case's time in a graph, the latency of a call, its shares of measured rates, and its predicted time."""
    result = case.call()
    moved = sum(t.nbytes for t in (*case.inputs, *(result if isinstance(result, tuple) else (result,))))
    taken = clock.deciles(clock.timed(case.call, DEVICE, graph=True, calls=3))
    model = predicted(case.name)
    latency = clock.latency(case.call) if DEVICE == "cuda" else None
    rate = floor["matrix_per_s"].get(str(case.inputs[0].dtype).removeprefix("torch."))
    return {
        "case": case.name, **taken, "latency_s": latency,
        "of_copy_rate": moved / taken["median_s"] / floor["copy_bytes_per_s"],
        "of_matrix_rate": 2 * case.products / taken["median_s"] / rate if rate and case.products else None,
        "predicted_us": model, "over_predicted": taken["median_s"] * 1e6 / model if model else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.kernels", description=(__doc__ or "").split("\n", 1)[0])
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path)
    wanted.add_argument("--once", action="store_true")
    wanted.add_argument("--repeat", type=int, metavar="TIMES")
    parser.add_argument("--tiny", action="store_true", help="the small cases that every test run sanitizes")
    options = parser.parse_args()
    made = (small if options.tiny else compile_cases).cases(partial(small.made, device=DEVICE))
    cases = (case for case in made if case.quick)
    if options.repeat:
        changed = {case.name: count for case in cases if (count := repeats(case, options.repeat))}
        print(f"{len(changed)} kernels gave other bits in {options.repeat} repeats: {changed}")
        return int(bool(changed))
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
