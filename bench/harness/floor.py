"""What this machine can do at best, measured as cases like any other: copy bandwidth and matrix rate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness.case import Case, Implementation, relative_error

COPY, PRODUCT, LAUNCH = "floor: copy", "floor: product", "floor: smallest call"


def cases(device: str = "cpu", small: bool = False) -> Iterator[Case]:
    """A large copy, a large product in every dtype of the device, and the smallest call there is."""
    words = 1 << (18 if small else 26 if device == "cpu" else 29)
    yield Case(f"{COPY} {8 * words} bytes", lambda: [_copy(words, device)], "torch.copy_")
    edge = 128 if small else 1024 if device == "cpu" else 8192
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
    for dtype in dtypes:
        name = f"{PRODUCT} {2 * edge**3} operations {str(dtype).removeprefix('torch.')}"
        yield Case(name, lambda dtype=dtype: [_product(edge, dtype, device)], "torch.mm")
    yield Case(LAUNCH, lambda: [_add(device)], "torch.add_")


def _copy(words: int, device: str) -> Implementation:
    source = torch.ones(words, device=device)
    target = torch.zeros_like(source)
    return Implementation(
        "torch.copy_", lambda: lambda: target.copy_(source), lambda out: relative_error(out, source), 0.0
    )


def _product(edge: int, dtype: torch.dtype, device: str) -> Implementation:
    a = torch.ones(edge, edge, device=device, dtype=dtype)
    b, out = a.clone(), a.clone()
    return Implementation(
        "torch.mm", lambda: lambda: torch.mm(a, b, out=out),
        lambda found: relative_error(found, torch.full_like(found, edge, dtype=torch.float64)), 0.0,
    )  # fmt: skip


def _add(device: str) -> Implementation:
    one = torch.zeros(1, device=device)
    return Implementation("torch.add_", lambda: lambda: one.add_(1), lambda out: 0.0, 0.0)


@dataclass(frozen=True)
class Floor:
    """Measured rates.

    Attributes:
        copy_bytes_per_s: Bytes read plus bytes written per second by a large ``copy_``.
        matrix_per_s: Floating-point operations per second of a large matrix product, by dtype.
        launch_s: Seconds of the smallest call.
    """

    copy_bytes_per_s: float
    matrix_per_s: Mapping[str, float]
    launch_s: float

    def seconds(self, bytes_moved: float, operations: float = 0.0, dtype: str = "float32") -> float:
        """A lower bound for a task: whichever of its two needs takes longer."""
        rate = self.matrix_per_s.get(dtype, max(self.matrix_per_s.values()))
        return max(bytes_moved / self.copy_bytes_per_s, operations / rate)


def read(rows: Iterable[Mapping[str, Any]]) -> Floor | None:
    """The floor among a report's cases; None where it was not measured."""
    copy, launch = 0.0, 0.0
    rates: dict[str, float] = {}
    for row in rows:
        seconds = row["p10_s"]
        if not str(row["case"]).startswith("floor:") or not seconds:
            continue
        amount = re.search(r"(\d+) (?:bytes|operations)(?: (\w+))?", row["case"])
        if row["case"].startswith(COPY) and amount:
            copy = int(amount[1]) / seconds
        elif row["case"].startswith(PRODUCT) and amount:
            rates[amount[2]] = int(amount[1]) / seconds
        else:
            launch = seconds
    return Floor(copy, rates, launch) if copy and rates else None
