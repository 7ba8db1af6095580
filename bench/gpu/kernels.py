"""Every kernel's time over the compile report's prediction, and its share of the device's measured rates.

python -m bench.gpu.kernels --out DIR [--tiny]       # writes DIR/kernels.json
python -m bench.gpu.kernels --once [--tiny]          # one launch of each, for a profiler or a sanitizer
python -m bench.gpu.kernels --repeat 10000 [--tiny]  # each result must have the same bits every time

``--tiny`` takes the small cases that every test run sanitizes; timed are all cases that are predicted, which it makes
small.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import clock
from bench.gpu import compile_cases
from bench.gpu.compile_cases import Call, Case
from bench.gpu.sanitize import cases as small
from bench.report import pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Calls of a graph: the replay of a single one would take longer than it.
CALLS = 20
#: A time is as predicted up to this factor, above or below.
RIGHT = 2.0


def predictions() -> dict[str, float]:
    """Return the microseconds that the compile report predicts for calls on this device, in a dry run on an sm_90."""
    rows = json.loads((pages.RESULTS / "compile.json").read_text())["rows"]
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability()) if DEVICE == "cuda" else "sm_90"
    return {row["case"]: row["call_us"] for row in rows if row["arch"] == arch and row["call_us"]}


def turns(case: Case) -> list[Call]:
    """Return a graph's calls, of copies of the inputs that exceed the cache together."""
    if DEVICE == "cpu":
        return [case.call]
    moved = sum(t.nbytes for t in case.inputs)
    copies = min(CALLS, 1 + 2 * torch.cuda.get_device_properties(0).L2_cache_size // max(moved, 1))

    def copied(call: Any) -> Call:
        return partial(call.func, *(x.clone() if isinstance(x, Tensor) else x for x in call.args), **call.keywords)

    calls = [copied(case.call) for _ in range(copies)]
    return [calls[i % copies] for i in range(CALLS)]


def in_graph(calls: Sequence[Call]) -> dict[str, float]:
    """Return the deciles of a call's seconds in a graph of all, each of which frees its results."""

    def every() -> None:
        for call in calls:
            call()

    return clock.deciles([time / len(calls) for time in clock.timed(every, DEVICE, graph=True, calls=1)])


def bits(result: Any) -> Tensor:
    """Return the bits of a launcher's results in one tensor."""
    return torch.cat([t.flatten().view(torch.int32) for t in (result if isinstance(result, tuple) else (result,))])


def repeats(case: Case, times: int) -> int:
    """Return how many of a case's results differ in a bit from the first."""
    first = bits(case.call())
    return int(sum((bits(case.call()) != first).any().long() for _ in range(times)))


def measure(case: Case, floor: dict[str, Any], predicted: float | None) -> dict[str, Any]:
    """Return a call's time in a graph, its latency, its shares of measured rates, and what became of its prediction."""
    result, calls = case.call(), turns(case)
    taken = in_graph(calls)
    moved = sum(t.nbytes for t in (*case.inputs, *(result if isinstance(result, tuple) else (result,))))
    rate = floor["matrix_per_s"].get(str(case.inputs[0].dtype).removeprefix("torch."))
    over = taken["median_s"] * 1e6 / predicted if predicted else None
    verdict = None if over is None else "as predicted" if 1 / RIGHT <= over <= RIGHT else "REFUTED"
    return {
        "case": case.name, "predicted_us": predicted, "over_predicted": over,
        "verdict": verdict if DEVICE == "cuda" else "reached", **taken,
        "latency_s": clock.latency(case.call) if DEVICE == "cuda" else None,
        "of_copy_rate": moved / taken["median_s"] / floor["copy_bytes_per_s"],
        "of_matrix_rate": 2 * case.products / taken["median_s"] / rate if rate and case.products else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.kernels", description=(__doc__ or "").split("\n", 1)[0])
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path)
    wanted.add_argument("--once", action="store_true")
    wanted.add_argument("--repeat", type=int, metavar="TIMES")
    parser.add_argument("--tiny", action="store_true", help="small cases or sizes")
    options = parser.parse_args()
    make = partial(small.made, device=DEVICE)
    cases = (case for case in (small if options.tiny else compile_cases).cases(make) if case.quick)
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
    predicted, floor = predictions(), clock.floor(DEVICE)

    def shrunk(*shape: int, **how: Any) -> Tensor:
        return make(*(min(size, 8) for size in shape), **how)

    rows, failed = [], False
    for case in compile_cases.cases(shrunk if options.tiny else make):
        if case.name in predicted or (case.quick and not options.tiny):
            try:
                rows.append(measure(case, floor, predicted.get(case.name)))
            except Exception as problem:  # the other kernels are still worth measuring
                failed = True
                print(f"FAILED {case.name}: {type(problem).__name__}: {problem}", file=sys.stderr)
    reached = {row["case"] for row in rows}
    if missed := sorted(predicted.keys() - reached):
        failed = True
        print(f"NOT REACHED: {', '.join(missed)}", file=sys.stderr)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "interpreter"
    origin = pages.origin(("torch", "triton"), name)
    pages.store(options.out / "kernels.json", {**origin, "floor": floor, "rows": rows})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
