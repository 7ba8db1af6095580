"""Each kernel's share of the device's measured rates, from the bytes and operations of `work`.

python -m bench.gpu.kernels --out DIR [--tiny]     # writes DIR/kernels.json
python -m bench.gpu.kernels --once [--tiny]        # one launch of each, for a profiler or a sanitizer
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastgrad
from bench import clock, results_file
from bench.gpu import work
from fastgrad.ops.triton import devices

TINY = (
    "contrast_sqnorm B=3 N=40 D=16 fp32 cross_entropy",
    "target_sqnorm B=3 N=40 D=16 fp32 ones cross_entropy",
    "linear_contrast_sqnorm B=3 N=40 D=16 fp32 cross_entropy",
    "linear_contrast_stats B=3 N=40 D=16 fp32 cross_entropy",
)


def call(case: str, device: str) -> Callable[[], Any]:
    """The operator of a case on random tensors."""
    operator, size, dtype = work.parse(case)
    B, N, D = size["B"], size["N"], size["D"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    h = normal(B, D)
    if operator in ("contrast_sqnorm", "target_sqnorm"):
        z = normal(B, N)
        if operator == "contrast_sqnorm":
            return lambda: fastgrad.contrast_sqnorm(h, z, impl="triton")
        return lambda: fastgrad.target_sqnorm(h, z, "ones", impl="triton")
    weight, bias = normal(N, D), normal(N)
    function = getattr(fastgrad, operator)
    return lambda: function(h, weight, bias, impl="triton")


def measure(case: str, device: str, floor: clock.Floor) -> dict[str, Any]:
    """Median of a case and shares of the measured rates."""
    run = call(case, device)
    run()
    timer = clock.timer(device)
    replay = run if device == "cpu" else clock.graphed(run)
    times = torch.tensor([timer(replay) for _ in range(3 if device == "cpu" else 50)], dtype=torch.float64)
    seconds = float(times.median())
    launches = work.launches(case, devices.architecture(torch.empty(1, device=device)))
    moved, useful = sum(w.memory for w in launches), sum(w.useful for w in launches)
    rate = floor.matrix_per_s.get(str(work.parse(case)[2]).removeprefix("torch."), 0.0)
    return {
        "case": case, "median_s": seconds, "p10_s": float(times.quantile(0.1)), "p90_s": float(times.quantile(0.9)),
        "of_copy_rate": moved / seconds / floor.copy_bytes_per_s,
        "of_matrix_rate": useful / seconds / rate if rate and useful else None,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.gpu.kernels", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = TINY if options.tiny else work.CASES
    if options.once:
        for case in chosen:
            call(case, device)()
        if device == "cuda":
            torch.cuda.synchronize()
        return 0
    if options.out is None:
        parser.error("--out must name a folder")
    floor = clock.floor(device, options.tiny)
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    found, failed = [], 0
    for case in chosen:
        try:
            found.append(measure(case, device, floor))
        except Exception as problem:  # the other kernels are still worth measuring
            failed += 1
            print(f"FAILED {case}: {type(problem).__name__}: {problem}", file=sys.stderr)
    document = {
        "device": name, "versions": results_file.versions("torch", "triton"), "revision": results_file.revision(),
        "copy_bytes_per_s": floor.copy_bytes_per_s, "matrix_per_s": dict(floor.matrix_per_s), "rows": found,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
