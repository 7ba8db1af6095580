"""The first layer of the introspective classifier: on stored contrast rows, and on rows that are never formed.

Errors allowed, relative to the largest entry of the float64 result: sqrt(N D) roundings of the working precision for
float32, 2^-6 for halves, whose rows are rounded once more than in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgrad
from bench.micro.contrast_peers import normals
from bench.registry import Implementation, case, scaled_error


@case(
    "rows", "rows B={0} N={1} D={2} U={3} {4}", against="stored rows",
    names=("fastgrad", "stored rows", "rows written, then linear"),
    tiny=[(3, 5, 8, 7, "float32")], quick=[(64, 10, 512, 300, "float32")],
    full=[(*shape, "float32") for shape in (
        (1, 10, 64, 300), (256, 10, 64, 300), (1, 10, 512, 300), (64, 10, 512, 300), (1024, 10, 512, 300),
        (1, 1000, 512, 64), (32, 1000, 512, 64),
    )],
    gpu=[(64, 10, 512, 300, "bfloat16"), (32, 1000, 2048, 128, "bfloat16")],
)  # fmt: skip
def rows(B: int, N: int, D: int, U: int, name: str, device: str) -> Iterator[Implementation]:
    """``contrast_rows_linear`` against a product with rows in memory."""
    dtype = getattr(torch, name)
    h, z, weight, bias = normals(device, (B, D), (B, N), (U, N * D), (U,), dtype=dtype)
    exact = 2 * (z.double() - 1).unsqueeze(-1) * h.double().unsqueeze(-2)
    wanted = F.linear(exact.flatten(-2), weight.double(), bias.double())
    tolerance = 2.0**-6 if dtype != torch.float32 else 2.0**-23 * (N * D) ** 0.5
    check = partial(scaled_error, reference=wanted)
    stored = (2 * (z.float() - 1).unsqueeze(-1) * h.float().unsqueeze(-2)).flatten(-2).to(dtype)

    def written() -> Tensor:
        return F.linear(fastgrad.contrast_rows(h, z).flatten(-2).to(dtype), weight, bias)

    ours = partial(fastgrad.contrast_rows_linear, h, z, weight, bias)
    yield Implementation("fastgrad", lambda: ours, check, tolerance)
    yield Implementation("stored rows", lambda: lambda: F.linear(stored, weight, bias), check, tolerance)
    yield Implementation("rows written, then linear", lambda: written, check, tolerance)
