"""Launch configurations of the Triton kernels: pure functions of shape, dtype and architecture.

A JSON file that the environment variable ``FASTGRAD_TUNED`` names replaces choices for the last layer by measured ones;
``python -m bench.gpu.tune`` writes it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

#: Keyword arguments of a launch: the kernel's constants and the compiler's options.
Options = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """The properties of a device that a choice depends on."""

    backend: Literal["cuda", "hip", "cpu"]  # cpu: the interpreter
    version: int  # compute capability times ten (80, 90, 120), the number in gfx942, or 0
    processors: int  # streaming multiprocessors or compute units
    shared_memory: int  # bytes one program may use

    @property
    def name(self) -> str:
        """What compilers call it."""
        return f"gfx{self.version}" if self.backend == "hip" else f"sm_{self.version}"

    @property
    def threads(self) -> int:
        """Threads of a warp."""
        return 64 if self.backend == "hip" and self.version < 1000 else 32

    @property
    def multiplies(self) -> bool:
        """Whether products compile to instructions of its matrix units, or are interpreted."""
        return self.backend == "cpu" or (self.version >= 80 if self.backend == "cuda" else self.threads == 64)


#: Every report compiles the kernels for these. Other GPUs of the families differ in the number of processors.
KNOWN_ARCHITECTURES = {
    "sm_75": Architecture("cuda", 75, 40, 64 << 10),
    "sm_80": Architecture("cuda", 80, 108, 163 << 10),
    "sm_86": Architecture("cuda", 86, 84, 99 << 10),
    "sm_89": Architecture("cuda", 89, 128, 99 << 10),
    "sm_90": Architecture("cuda", 90, 132, 227 << 10),
    "sm_100": Architecture("cuda", 100, 148, 227 << 10),
    "sm_120": Architecture("cuda", 120, 170, 99 << 10),
    "gfx942": Architecture("hip", 942, 304, 64 << 10),
    "gfx950": Architecture("hip", 950, 256, 160 << 10),
    "gfx1100": Architecture("hip", 1100, 48, 64 << 10),
}
INTERPRETER = Architecture("cpu", 0, 1, 1 << 20)


#: What a file of measured choices may set. The logits of a row's tile are not among it: too few would be wrong.
MEASURED = {"ROWS", "BLOCK_D", "num_warps"}


def power_of_two(n: int) -> int:
    """Return the smallest power of two not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def chunk(n: int, parts: int, step: int) -> int:
    """Return how much of ``n`` each of ``parts`` programs takes: whole steps, so that vector loads stay aligned."""
    return cdiv(cdiv(n, max(parts, 1)), step) * step


def _block(size: int, largest: int) -> int:
    """Return the least power of two from 16 to ``largest`` that covers ``size``, or ``largest`` if none does."""
    return min(max(power_of_two(size), 16), largest)


def bucket(B: int, N: int, D: int, loss: str, arch: Architecture) -> str:
    """Return the key of a measured choice: shapes between the same powers of two share it."""
    sizes = (power_of_two(n) for n in (B, N, D))
    return " ".join(map(str, (arch.backend, arch.version, loss, *sizes)))


@lru_cache(1)
def measured() -> dict[str, Options]:
    """Return the measured choices by `bucket`; a ValueError if the file holds something else."""
    path = os.environ.get("FASTGRAD_TUNED")
    found: dict[str, Options] = json.loads(Path(path).read_text()) if path else {}
    for key, options in found.items():
        for name, value in options.items():
            if name not in MEASURED or type(value) is not int or value < 1 or value & (value - 1):
                raise ValueError(
                    f"{path} must give powers of two for {', '.join(sorted(MEASURED))}; for {key!r} it gave "
                    f"{name} = {value!r}"
                )
    return found


def longest_row(loss: str) -> int:
    """Return the most logits that stay in the registers of one program: 32 in each of 512 threads, 16 for brier."""
    return 8192 if loss == "brier" else 16384


@lru_cache(1024)
def last_layer(B: int, N: int, D: int, loss: str, arch: Architecture) -> tuple[Options, int]:
    """Choose for features ``(B, D)`` and logits ``(B, N)``; return also how many programs share a row, 0 if none do.

    Short rows belong to one program whole, several (``ROWS``) if both logits and features are few and the programs
    still fill the device. Features are loaded in one step as long as 512 threads can hold 32 each. Of a longer row
    every program has one tile.
    """
    if longest_row(loss) >= N:
        block, wide = max(power_of_two(N), 16), max(power_of_two(D), 16)
        rows = max(1, 1024 // max(block, wide))
        while rows > 1 and cdiv(B, rows) < 2 * arch.processors:
            rows //= 2
        logits, features = rows * block, rows * wide
        if cdiv(B, rows) >= 8 * arch.processors:
            # 32 numbers a thread, so that short rows belong to one warp and no thread waits for another warp's sums.
            warps = max(logits // (512 if loss == "brier" else 1024), features // 1024)
        else:
            # Fewer rows take more threads each, 8 to 32 logits a thread.
            warps = max(min(logits // 256, max(4, logits // 512)), features // 512)
        warps = min(max(1, warps), 16) * 32
        options = {"ROWS": rows, "BLOCK_N": block, "num_warps": max(1, warps // arch.threads)}
        options["BLOCK_D"] = _block(D, max(16, 32 * warps // rows))
        tiles = 0
    else:
        block = 8192
        while block > 1024 and B * cdiv(N, block) < 2 * arch.processors:
            block //= 2
        tiles = cdiv(N, block)
        # 16 logits a thread, or 32.
        options = {"BLOCK_N": block, "num_warps": min(block // 16, 256) // arch.threads}
        options["BLOCK_D"] = _block(chunk(D, tiles, 16), block)
    return options | measured().get(bucket(B, N, D, loss, arch), {}), tiles


def _precision(dtype: torch.dtype, arch: Architecture) -> str:
    """Return the precision: three TF32 products keep float32 accuracy on NVIDIA's tensor cores; AMD's take float32."""
    return "tf32x3" if dtype == torch.float32 and arch.backend == "cuda" else "ieee"


def layer_direct(C: int, O: int, T: int, dtype: torch.dtype, arch: Architecture) -> Options:  # noqa: E741
    """Choose the tile of the weight gradient for C input and O output channels per group, and the positions of a step.

    The accumulator is all that a program keeps, so it is as large as the registers allow. Operands in float32 take
    twice the space.
    """
    wide = dtype == torch.float32
    block_o, block_c = _block(O, 64 if wide else 128), _block(C, 64 if wide else 128)
    # Below 32 positions a step of half-precision operands has less than 16 bytes for every thread.
    block_t = (16 if max(block_o, block_c) == 64 else 32) if wide else max(32, _block(T, 64))
    warps = 8 if block_o * block_c > 64 * 64 else 4
    stages = 2 if arch.backend == "hip" else 3
    return {
        "BLOCK_O": block_o, "BLOCK_C": block_c, "BLOCK_T": block_t, "PRECISION": _precision(dtype, arch),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def layer_gram(T: int, dtype: torch.dtype, arch: Architecture) -> Options:
    """Choose the tile of the Gram matrix of T positions."""
    wide = dtype == torch.float32
    # Two accumulators of block_t x block_t.
    block_t = _block(T, 32 if wide else 64)
    stages = 2 if arch.backend == "hip" else 3
    return {
        "BLOCK_T": block_t, "BLOCK_K": 32 if wide else 64, "PRECISION": _precision(dtype, arch),
        "num_warps": 4, "num_stages": stages,
    }  # fmt: skip


def layer_prefers_gram(C: int, O: int, T: int) -> bool:  # noqa: E741
    """Whether the symmetric half of ``T^2 (C + O)`` products is below a quarter of the direct route's ``T C O``."""
    return 2 * T * (C + O) < C * O
