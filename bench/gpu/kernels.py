"""Each kernel's share of the device's measured rates: of what it must at least read, write and multiply.

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

import fastgrad
from bench import clock, results_file
from bench.micro.last_layer_peers import normals
from fastgrad.ops.conv import sqnorm as layers

#: Operator, samples, classes, features, dtype. Layers have as many channels out and in, at 14 by 14 positions.
CASES = (
    ("contrast_sqnorm", 4096, 1000, 512, "bfloat16"),
    ("contrast_sqnorm", 4096, 16384, 4096, "float32"),
    ("contrast_sqnorm", 4096, 32000, 4096, "bfloat16"),
    ("contrast_sqnorm", 4096, 262144, 4096, "bfloat16"),
    ("contrast_sqnorm", 8, 131072, 4096, "bfloat16"),
    ("target_sqnorm", 4096, 1000, 512, "bfloat16"),
    ("linear_contrast_sqnorm", 1, 1000, 2048, "bfloat16"),
    ("linear_contrast_sqnorm", 32, 1000, 2048, "bfloat16"),
    ("linear_contrast_sqnorm", 64, 32000, 4096, "bfloat16"),
    ("linear_contrast_sqnorm", 1024, 32000, 4096, "bfloat16"),
    ("linear_contrast_sqnorm", 1024, 1000, 2048, "float32"),
    ("linear_contrast_stats", 8, 128256, 4096, "bfloat16"),
    ("linear_contrast_stats", 1024, 128256, 4096, "bfloat16"),
    ("conv_sqnorm", 64, 256, 256, "bfloat16"),
    ("conv_sqnorm", 64, 256, 256, "float32"),
    ("linear_sqnorm", 64, 768, 768, "bfloat16"),
    ("linear_sqnorm", 64, 3072, 768, "bfloat16"),
)
#: Multiplications for each sample, class and feature; of a layer whose gradients are formed.
PRODUCTS = {"linear_contrast_sqnorm": 1, "linear_contrast_stats": 1, "conv_sqnorm": 9 * 196, "linear_sqnorm": 196}
TINY = tuple((operator, 3, 40, 16, "float32") for operator in dict.fromkeys(case[0] for case in CASES))


def prepared(operator: str, B: int, N: int, D: int, dtype: str, device: str) -> partial[Any]:
    """Return the operator on random tensors."""
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "contrast_sqnorm": ((B, D), (B, N)), "target_sqnorm": ((B, D), (B, N)),
        "conv_sqnorm": ((B, D, 14, 14), (B, N, 14, 14)), "linear_sqnorm": ((B, 196, D), (B, 196, N)),
    }  # fmt: skip
    rest = {"target_sqnorm": ("ones",), "conv_sqnorm": ((3, 3), (1, 1), (1, 1), (1, 1), 1)}.get(operator, ())
    operands = normals(device, *shapes.get(operator, ((B, D), (N, D), (N,))), dtype=getattr(torch, dtype))
    function = getattr(layers if operator in ("conv_sqnorm", "linear_sqnorm") else fastgrad, operator)
    return partial(function, *operands, *rest, impl="triton")


def measure(operator: str, B: int, N: int, D: int, dtype: str, *, device: str, floor: dict[str, Any]) -> dict[str, Any]:
    """Return the median of a case and its shares of the measured rates."""
    run = prepared(operator, B, N, D, dtype, device)
    result = run()
    tensors = (*run.args, *(result if isinstance(result, tuple) else (result,)))
    moved = sum(t.nbytes for t in tensors if torch.is_tensor(t))
    replay, rounds = (run, 3) if device == "cpu" else (clock.graphed(run), 50)
    timer = clock.timer(device)
    cut = clock.deciles([timer(replay) for _ in range(rounds)])
    rate = floor["matrix_per_s"].get(dtype)
    return {
        "case": f"{operator} B={B} N={N} D={D} {dtype}", "median_s": cut[4], "p10_s": cut[0], "p90_s": cut[8],
        "of_copy_rate": moved / cut[4] / floor["copy_bytes_per_s"],
        "of_matrix_rate": 2 * B * N * D * PRODUCTS[operator] / cut[4] / rate if rate and operator in PRODUCTS else None,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.kernels", description=(__doc__ or "").split("\n", 1)[0])
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path)
    wanted.add_argument("--once", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = TINY if options.tiny else CASES
    if options.once:
        for case in cases:
            prepared(*case, device)()
        if device == "cuda":
            torch.cuda.synchronize()
        return 0
    floor = clock.floor(device, options.tiny)
    rows, failed = [], False
    for case in cases:
        try:
            rows.append(measure(*case, device=device, floor=floor))
        except Exception as problem:  # the other kernels are still worth measuring
            failed = True
            print(f"FAILED {case}: {type(problem).__name__}: {problem}", file=sys.stderr)
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    origin = results_file.origin(("torch", "triton"), name)
    results_file.store(options.out / "kernels.json", {**origin, "floor": floor, "rows": rows})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
