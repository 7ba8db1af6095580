"""Check every kernel on the device against float64, with nothing but torch and Triton: no test runner is needed.

    python -m bench.gpu.check [--tiny]

On a CPU the kernels run in the interpreter (``TRITON_INTERPRET=1``). Prints one line a combination that fails and a
count; exit status 1 if there was one.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgrad
from fastgrad import losses
from fastgrad.ops.dispatch import KERNEL_DTYPES

SHAPES = [(1, 1, 1), (3, 10, 64), (64, 1000, 512), (33, 17001, 200), (130, 4096, 384), (2, 70000, 96)]
TINY = [(1, 1, 1), (3, 10, 20)]
DTYPES = tuple(KERNEL_DTYPES)
#: Relative error of a squared norm, absolute of its logarithm beyond its own roundings.
ALLOWED = 1e-5


def made(shape: tuple[int, ...], dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def distance(found: Tensor, wanted: Tensor, log: bool = False) -> float:
    """Largest relative error; for logarithms relative to the larger of 1 and the logarithm."""
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    base = wanted.abs().clamp_min(1.0) if log else wanted.abs().clamp_min(1e-300)
    return float(((found.double() - wanted).abs() / base).max()) if found.numel() else 0.0


def scaled(found: Tensor, wanted: Tensor) -> float:
    """Largest error over the largest entry."""
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


def check(
    shape: tuple[int, int, int], dtype: torch.dtype, loss: str, device: str
) -> dict[str, tuple[float, float]]:
    """Errors of every operator beside what is allowed."""
    B, N, D = shape
    h, z = made((B, D), dtype, device), made((B, N), dtype, device, 3.0)
    weight, bias = made((N, D), dtype, device, 3 / D**0.5), made((N,), dtype, device)
    unit = 64 * torch.finfo(dtype).eps
    found: dict[str, tuple[float, float]] = {}
    for log in (False, True):
        suffix = " log" if log else ""
        wanted = fastgrad.contrast_sqnorm(h.double(), z.double(), loss=loss, log=log, impl="eager")
        if N > 1:
            got = fastgrad.contrast_sqnorm(h, z, loss=loss, log=log, impl="triton")
            found["contrast_sqnorm" + suffix] = (distance(got, wanted, log), ALLOWED)
            for target in ("uniform", "predicted"):
                wanted = fastgrad.target_sqnorm(
                    h.double(), z.double(), target, loss=loss, log=log, impl="eager"
                )
                got = fastgrad.target_sqnorm(h, z, target, loss=loss, log=log, impl="triton")
                found[f"target_sqnorm {target}{suffix}"] = (distance(got, wanted, log), ALLOWED)
            logits, got = fastgrad.linear_contrast_sqnorm(h, weight, bias, loss=loss, log=log, impl="triton")
            wanted = fastgrad.contrast_sqnorm(h.double(), logits.double(), loss=loss, log=log, impl="eager")
            exact = F.linear(h.double(), weight.double(), bias.double())
            found["linear_contrast_sqnorm logits" + suffix] = (scaled(logits, exact), unit)
            found["linear_contrast_sqnorm" + suffix] = (distance(got, wanted, log), ALLOWED)
    stats = torch.stack(list(fastgrad.linear_contrast_stats(h, weight, bias, loss=loss, impl="triton")))
    exact = F.linear(h.double(), weight.double(), bias.double())
    norms = fastgrad.contrast_sqnorm(h.double(), exact, loss=loss, impl="eager")
    # The kernel's logits round to the dtype, and norms follow logits.
    found["linear_contrast_stats max"] = (scaled(stats[1], norms.amax(-1)), 64 * unit)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.gpu.check", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tiny", action="store_true", help="two small shapes and one dtype")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    checked = failed = 0
    worst: dict[str, float] = {}
    shapes, dtypes = (TINY, DTYPES[:1]) if options.tiny else (SHAPES, DTYPES)
    for shape, dtype, loss in itertools.product(shapes, dtypes, losses.LOSSES):
        try:
            errors = check(shape, dtype, loss, device)
        except Exception as problem:  # one combination that breaks must not hide the others
            errors = {f"{type(problem).__name__}: {problem}".splitlines()[0]: (float("inf"), 0.0)}
        for name, (error, allowed) in errors.items():
            checked += 1
            worst[name] = max(worst.get(name, 0.0), error)
            if not error <= allowed:
                failed += 1
                print(f"FAILED {name} {shape} {dtype} {loss}: error {error:.2e}, allowed {allowed:.2e}")
    for name, error in worst.items():
        print(f"{name}: worst error {error:.2e}")
    print(f"{checked} checks on {device}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
