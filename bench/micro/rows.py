"""The first layer of the introspective network: on stored contrast rows, and on rows that are never formed.

Allowed errors, relative to the largest entry: sqrt(N D) roundings of the working precision for float32, 2^-6 for
halves, whose rows are rounded once more than in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgrad
from bench.harness.case import Case, Implementation, scaled_error

SHAPES = {
    ("tiny", "cpu"): [(3, 5, 8, 7)],
    ("quick", "cpu"): [(64, 10, 512, 300)],
    ("full", "cpu"): [(1, 10, 64, 300), (256, 10, 64, 300), (1, 10, 512, 300), (64, 10, 512, 300), (1024, 10, 512, 300),
                      (1, 1000, 512, 64), (32, 1000, 512, 64)],
    ("quick", "cuda"): [(64, 10, 512, 300), (32, 1000, 2048, 128)],
    ("full", "cuda"): [(1, 10, 512, 300), (1024, 10, 512, 300), (4096, 10, 512, 300), (1, 1000, 2048, 128),
                       (32, 1000, 2048, 128), (256, 1000, 2048, 128)],
}  # fmt: skip


def cases(size: str = "full", device: str = "cpu", seed: int = 0) -> Iterator[Case]:
    """All cases of a size."""
    dtype = torch.float32 if device == "cpu" or size == "tiny" else torch.bfloat16
    for B, N, D, U in SHAPES[size, "cpu" if size == "tiny" else device]:
        yield Case(
            f"rows B={B} N={N} D={D} U={U} {str(dtype).removeprefix('torch.')}",
            lambda shape=(B, N, D, U): _implementations(shape, dtype, device, seed),
            "stored rows",
        )


def _implementations(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int
) -> list[Implementation]:
    B, N, D, U = shape
    made = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=made, device=device).to(dtype)

    h, z = normal(B, D), normal(B, N)
    weight, bias = normal(U, N * D), normal(U)
    rows = 2 * (z.double() - 1).unsqueeze(-1) * h.double().unsqueeze(-2)
    wanted = F.linear(rows.flatten(-2), weight.double(), bias.double())
    tolerance = 2.0**-6 if dtype != torch.float32 else 2.0**-23 * (N * D) ** 0.5

    def check(out: Tensor) -> float:
        return scaled_error(out, wanted)

    stored = (2 * (z.float() - 1).unsqueeze(-1) * h.float().unsqueeze(-2)).flatten(-2).to(dtype)

    def written() -> Tensor:
        return F.linear(fastgrad.contrast_rows(h, z).flatten(-2).to(dtype), weight, bias)

    return [
        Implementation(
            "fastgrad", lambda: lambda: fastgrad.contrast_rows_linear(h, z, weight, bias), check, tolerance
        ),
        Implementation("stored rows", lambda: lambda: F.linear(stored, weight, bias), check, tolerance),
        Implementation("rows written, then linear", lambda: written, check, tolerance),
    ]
