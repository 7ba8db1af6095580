"""Measure choices for the last layer's kernels on the device at hand, and write those that beat `fastgrad.ops.tune`.

    python -m bench.gpu.tune --out tuned.json
    FASTGRAD_TUNED=tuned.json python ...           # read by `fastgrad.ops.tune`

A choice replaces the default only if it takes at least 5 % less time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.compile_cases import configured, prepared
from bench.gpu.kernels import CALLS, DEVICE, in_graph
from bench.gpu.sanitize.cases import made
from fastgrad.ops import tune
from fastgrad.ops.triton import contrasts, devices
from fastgrad.ops.tune import Options

#: Shapes (B, N, D) that are measured; each stands for all between the same powers of two.
SHAPES = [
    *itertools.product((1, 32, 256, 4096), (10, 100, 1000), (512, 2048, 4096)),
    *itertools.product((1, 32, 256), (32_000, 128_256), (4096,)),
]
GAIN = 0.95


def candidates(plain: Options, D: int) -> Iterator[Options]:
    """Yield the default, and choices around it that have as many features or logits in a thread."""
    yield {}
    for rows, warps in itertools.product((0.5, 1, 2, 4), (0.5, 1, 2, 4)):
        changed: Options = {"num_warps": int(plain["num_warps"] * warps)}
        if "ROWS" in plain:
            changed["ROWS"] = int(plain["ROWS"] * rows)
            changed["BLOCK_D"] = min(
                tune.power_of_two(D), max(16, 1024 * changed["num_warps"] // max(1, changed["ROWS"]))
            )
        elif rows != 1:
            continue
        if 1 <= changed["num_warps"] <= 16 and changed.get("ROWS", 1) >= 1 and (rows, warps) != (1, 1):
            yield changed


def fastest(B: int, N: int, D: int, loss: str) -> dict[str, Any]:
    """Return the fastest choice for a shape, its time over the default's, and the default's microseconds."""
    call = prepared(contrasts.contrast_sqnorm, partial(made, device=DEVICE), B, N, D, loss)
    plain, tiles = tune.last_layer(B, N, D, loss, devices.architecture(call.args[0]))
    times: list[tuple[float, Options]] = []
    for changed in candidates(plain, D):
        with configured(last_layer=({**plain, **changed}, tiles)):
            times.append((in_graph([call] * (CALLS if DEVICE == "cuda" else 1))["median_s"], changed))
    least, best = min(times, key=lambda pair: pair[0])
    return {"best": best, "ratio": least / times[0][0], "us": times[0][0] * 1e6}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.tune", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="one small shape, which the interpreter can run")
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.tiny:
        parser.error("PyTorch sees no CUDA device; --tiny walks through without one")
    found: dict[str, Options] = {}
    for B, N, D in [(2, 10, 20)] if options.tiny else SHAPES:
        row = fastest(B, N, D, "cross_entropy")
        print(f"B={B} N={N} D={D}: {row}", file=sys.stderr)
        if row["ratio"] <= GAIN and row["best"]:
            arch = devices.architecture(made(1, device=DEVICE))
            found |= {tune.bucket(B, N, D, loss, arch): row["best"] for loss in contrasts.PLAIN}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
