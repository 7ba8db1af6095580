"""Launch configurations of the Triton kernels: pure functions of shape, dtype and architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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


#: Every report compiles the kernels for these. Other GPUs of the families differ in the number of processors.
KNOWN_ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 108, 163 << 10),
    "sm_86": Architecture("cuda", 86, 84, 99 << 10),
    "sm_89": Architecture("cuda", 89, 128, 99 << 10),
    "sm_90": Architecture("cuda", 90, 132, 227 << 10),
    "sm_100": Architecture("cuda", 100, 148, 227 << 10),
    "sm_120": Architecture("cuda", 120, 170, 99 << 10),
    "gfx942": Architecture("hip", 942, 304, 64 << 10),
    "gfx950": Architecture("hip", 950, 256, 160 << 10),
}
INTERPRETER = Architecture("cpu", 0, 1, 1 << 20)


# The longest row that stays in the registers of one program: 32 logits in each of 512 threads.
LONGEST_ROW = 16384
# Estimates for an H100: microseconds that a program takes apart from its logits, and another launch; logits that a
# program reads and writes in a microsecond while another one shares its processor.
PROGRAM, LAUNCH, LOGITS = 1.0, 2.0, 1750
# Programs that share a row, at most: the next launch merges their parts in one step.
MOST_SPLITS = 64
# Parts of a row of statistics, at most, which one program merges.
MOST_PARTS = 1024


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


@lru_cache(1024)
def contrast(B: int, N: int, D: int, loss: str, arch: Architecture) -> tuple[Options, int]:
    """Choose for features ``(B, D)`` and logits ``(B, N)``; return also how many programs share a row.

    A row up to ``LONGEST_ROW`` stays on chip. Several short rows (``ROWS``, set only here) share a program as long as
    the programs still fill the device. Longer rows are swept twice, by one program or by several.
    """
    # Brier keeps twice as many numbers per logit.
    longest = LONGEST_ROW // 2 if loss == "brier" else LONGEST_ROW
    if longest >= N:
        block = max(power_of_two(N), 16)
        rows = max(1, 1024 // block)
        # One 16-byte access of half precision for each thread of the smallest program.
        least = 512 if arch.backend == "hip" else 256
        while rows * block > least and rows > 1 and cdiv(B, rows) < 2 * arch.processors:
            rows //= 2
        width = rows * block
        if cdiv(B, rows) >= 8 * arch.processors:
            # 32 logits a thread, so that short rows belong to one warp and no thread waits for another warp's sums.
            warps = width // (512 if loss == "brier" or arch.version == 89 else 1024)
        else:
            # Fewer rows take more threads each, 8 to 32 logits a thread.
            warps = min(width // 256, max(4, width // 512))
        warps = min(max(1, warps), 16)
        if arch.backend == "hip":
            warps = max(1, warps // 2)  # 64 threads each
        block_d = _block(D, max(16, 2048 // rows))
        return {"ROWS": rows, "BLOCK_N": block, "BLOCK_D": block_d, "num_warps": warps}, 1
    # Rows that are no multiple of 16 bytes take registers for addresses, of which brier and the squares of unbounded
    # logits leave too few in eight warps. Sigmoids and squares need more before sm_90, squares also since sm_100.
    unaligned = N % 8 != 0
    softmax = loss == "cross_entropy"
    block = 8192 if softmax and not unaligned else 2048 if loss == "brier" and arch.version >= 100 else 4096
    crowded = unaligned or (arch.version < 90 and loss != "brier")
    crowded = crowded or (arch.version >= 100 and loss == "mse")
    warps = 16 if crowded and not softmax and arch.backend == "cuda" else 8
    if unaligned and loss == "bce" and arch.version == 90:
        block, warps = 2048, 8
    # A processor holds two programs, and the last wave should not be nearly empty.
    places = 2 * arch.processors

    def cost(splits: int) -> float:
        return cdiv(B * splits, places) * (N / splits / LOGITS + PROGRAM) + LAUNCH * (splits > 1)

    splits = min(range(1, min(MOST_SPLITS, cdiv(N, 2048)) + 1), key=cost)
    splits = 1 if cost(1) <= 1.1 * cost(splits) else splits
    block = min(block, max(2048, power_of_two(cdiv(N, splits))))
    if arch.backend == "hip":
        warps = min(warps, block // 512)  # 64 threads each, with one 16-byte access of half precision
    return {"BLOCK_N": block, "BLOCK_D": _block(D, 2048), "num_warps": warps}, splits


def _precision(dtype: torch.dtype, arch: Architecture) -> str:
    """Return the precision: three TF32 products keep float32 accuracy on NVIDIA's tensor cores; AMD's take float32."""
    return "tf32x3" if dtype == torch.float32 and arch.backend == "cuda" else "ieee"


@lru_cache(1024)
def linear_stats(
    B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture, loss: str = "cross_entropy"
) -> tuple[Options, int]:
    """Choose the tile of a product of ``(B, D)`` and ``(N, D)``: BLOCK_M samples, BLOCK_N classes, BLOCK_K features.

    Return also how many tiles a program walks through.
    """
    wide = dtype == torch.float32
    block_m = _block(B, 64 if wide else 128)
    if block_m == 128:
        block_n, block_k, warps = 128, 64, 8
    else:
        # Few rows: the weight is read once at memory speed, which takes many programs with deep queues of loads.
        block_n, block_k, warps = 64, 128, 4
        if wide:
            block_k = 32 if block_m == 64 else 64
    if arch.backend == "cuda":
        before_sm_90, since_sm_100 = arch.version < 90, arch.version >= 100
        if block_m == 128:
            # The moments of wider tiles do not fit the registers: before sm_90 the product's operands take many, and
            # since sm_100 a thread holds whole rows. For bce, Triton before 3.9 needs more of them.
            block_n = 64 if before_sm_90 or since_sm_100 or loss in ("mse", "bce") else 128
        elif block_m == 64 and wide:
            # The three products of float32 hold three pairs of operands.
            block_n = 32
        elif block_m == 16 and before_sm_90 and loss == "bce":
            block_k = 64
    # Tiles shrink, the longer side first, until there is one for every processor.
    while max(block_m, block_n) > 16 and cdiv(B, block_m) * cdiv(N, block_n) < arch.processors:
        if block_n >= block_m:
            block_n //= 2
        else:
            block_m //= 2
    if arch.version in (86, 89) and block_m * block_n <= 1024:
        warps = min(warps, 4)  # eight warps run out of registers there
    while block_k > 16 and block_k // 2 >= D:
        block_k //= 2
    if arch.backend == "hip":
        # Each of the 64 threads of a warp loads 16 bytes of either operand.
        warps = min(warps, max(1, min(block_m, block_n) * block_k * dtype.itemsize // 1024))
    stage = (block_m + block_n) * block_k * dtype.itemsize
    # AMD's pipeline keeps the stage after next in registers, so two stages take the shared memory of one.
    stages = 2 if arch.backend == "hip" else max(1, min(4, (arch.shared_memory - 4096) // stage))
    tiles_m, tiles_n = cdiv(B, block_m), cdiv(N, block_n)

    def cost(tiles: int) -> float:
        # A quarter of a tile's time goes into starting a program.
        return cdiv(tiles_m * cdiv(tiles_n, tiles), arch.processors) * (tiles + 0.25)

    least = cdiv(tiles_n, MOST_PARTS)
    tiles = min((max(least, cdiv(tiles_m * tiles_n, wave * arch.processors)) for wave in range(2, 9)), key=cost)
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "PRECISION": _precision(dtype, arch),
        "num_warps": warps, "num_stages": stages,
    }, tiles  # fmt: skip


@lru_cache(1024)
def target(B: int, N: int, D: int, arch: Architecture) -> Options:
    """Choose for features ``(B, D)`` and logits ``(B, N)``; rows up to 2048 logits are one block."""
    block = _block(N, 2048)
    rows = max(1, 512 // block)
    while rows > 1 and cdiv(B, rows) < 2 * arch.processors:
        rows //= 2
    width = rows * block
    warps = 1 if width <= 256 else 2 if width <= 512 else 4 if width <= 1024 else 8
    block_d = _block(D, max(16, 2048 // rows))
    warps = max(1, warps // 2) if arch.backend == "hip" else warps
    return {"ROWS": rows, "BLOCK_N": block, "BLOCK_D": block_d, "num_warps": warps}


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
