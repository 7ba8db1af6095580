"""Launch configurations of the Triton kernels: pure functions of shape, dtype and architecture.

Nothing here touches a device or imports Triton, so every choice can be read, printed and tested anywhere.
``override`` replaces a choice for the duration of a ``with`` block: tests reach every path with it, and a user who has
tuned a shape can pin it. Nothing is tuned unless asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch


@dataclass(frozen=True)
class Architecture:
    """What a choice depends on.

    Attributes:
        backend: ``"cuda"``, ``"hip"`` or ``"cpu"`` (the interpreter).
        version: Compute capability times ten (80, 90, 100), the number in ``gfx942``, or 0.
        processors: Streaming multiprocessors or compute units.
        shared_memory: Bytes one program may use.
    """

    backend: str
    version: int
    processors: int
    shared_memory: int


KNOWN_ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 108, 163 << 10),
    "sm_90": Architecture("cuda", 90, 132, 227 << 10),
    "sm_100": Architecture("cuda", 100, 148, 227 << 10),
    "gfx942": Architecture("hip", 942, 304, 64 << 10),
}
INTERPRETER = Architecture("cpu", 0, 1, 1 << 20)


@dataclass(frozen=True)
class ContrastConfig:
    """How ``contrast_sqnorm`` runs.

    ``rows``: whole rows on chip; ``stream``: one row a program, two sweeps; ``split``: ``splits`` programs a row.
    """

    kind: Literal["rows", "stream", "split"]
    block_n: int
    block_d: int
    rows: int = 1
    splits: int = 1
    num_warps: int = 4


# The longest row that stays in the registers of one program: 32 logits in each of 512 threads.
LONGEST_ROW = 16384


def power_of_two(n: int) -> int:
    """The smallest power of two not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def contrast(B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture) -> ContrastConfig:
    """Choose for features ``(B, D)`` and logits ``(B, N)``.

    A row up to ``LONGEST_ROW`` stays on chip, with 8 to 32 logits a thread (one or more 16-byte accesses), and
    several short rows share a program as long as the programs still fill the device. Longer rows are swept twice, by
    one program where the batch fills the device and by several where it does not.
    """
    pinned = _pinned("contrast")
    if pinned is not None:
        return pinned
    if N <= LONGEST_ROW:
        block = max(power_of_two(N), 16)
        rows = max(1, 1024 // block)
        while rows > 1 and cdiv(B, rows) < 2 * arch.processors:
            rows //= 2
        width = rows * block
        warps = (
            1 if width <= 256 else 2 if width <= 512 else 4 if width <= 2048 else 8 if width <= 4096 else 16
        )
        if arch.backend == "hip":
            warps = max(1, warps // 2)  # 64 threads each
        block_d = min(max(power_of_two(D), 16), max(16, 2048 // rows))
        return ContrastConfig("rows", block, block_d, rows=rows, num_warps=warps)
    block, warps = 8192, 8
    block_d = min(max(power_of_two(D), 16), 2048)
    wanted = cdiv(2 * arch.processors, max(B, 1))
    splits = min(wanted, cdiv(N, block), 64)
    if splits > 1:
        return ContrastConfig("split", block, block_d, splits=splits, num_warps=warps)
    return ContrastConfig("stream", block, block_d, num_warps=warps)


@dataclass
class _Pins:
    configs: dict[str, Any] = field(default_factory=dict)


_PINS = _Pins()
_T = TypeVar("_T")


def _pinned(name: str) -> Any:
    return _PINS.configs.get(name)


@contextlib.contextmanager
def override(**configs: Any) -> Iterator[None]:
    """Use the given configurations, by name of the choosing function, whatever the shape.

    Example:
        >>> with override(contrast=ContrastConfig("stream", block_n=1024, block_d=64)):
        ...     ...
    """
    unknown = set(configs) - set(NAMES)
    if unknown:
        raise ValueError(
            f"configs must be named after one of {', '.join(NAMES)}; it was {', '.join(sorted(unknown))}"
        )
    before = dict(_PINS.configs)
    _PINS.configs.update(configs)
    try:
        yield
    finally:
        _PINS.configs = before


NAMES = ("contrast",)
