"""Launch configurations of the Triton kernels: pure functions of shape, dtype and architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

#: Constants of a kernel and what its compiler is told, as its launch takes them.
Options = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """The properties of a device that a choice depends on."""

    backend: Literal["cuda", "hip", "cpu"]  # cpu: the interpreter
    version: int  # compute capability times ten (80, 90, 100), the number in gfx942, or 0
    processors: int  # streaming multiprocessors or compute units
    shared_memory: int  # bytes one program may use


KNOWN_ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 108, 163 << 10),
    "sm_90": Architecture("cuda", 90, 132, 227 << 10),
    "sm_100": Architecture("cuda", 100, 148, 227 << 10),
    "gfx942": Architecture("hip", 942, 304, 64 << 10),
}
INTERPRETER = Architecture("cpu", 0, 1, 1 << 20)


# The longest row that stays in the registers of one program: 32 logits in each of 512 threads.
LONGEST_ROW = 16384


def power_of_two(n: int) -> int:
    """Return the smallest power of two not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)


def share(n: int, parts: int, step: int) -> int:
    """Return how much of ``n`` each of ``parts`` programs takes: whole steps, so that vector loads stay aligned."""
    return cdiv(cdiv(n, max(parts, 1)), step) * step


def _block(size: int, largest: int) -> int:
    """Return the least power of two from 16 to ``largest`` that covers ``size``, or ``largest`` if none does."""
    return min(max(power_of_two(size), 16), largest)


def contrast(B: int, N: int, D: int, loss: str, arch: Architecture) -> tuple[Options, int]:
    """Choose for features ``(B, D)`` and logits ``(B, N)``; return also how many programs share a row.

    A row up to ``LONGEST_ROW`` stays on chip, with 8 to 32 logits per thread (one or more 16-byte accesses). Several
    short rows (``ROWS``, set only here) share a program as long as the programs still fill the device.
    Longer rows are swept twice, by one program if the batch fills the device, else by several.
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
        warps = 1 if width <= 256 else 2 if width <= 512 else 4 if width <= 2048 else 8 if width <= 4096 else 16
        if arch.backend == "hip":
            warps = max(1, warps // 2)  # 64 threads each
        block_d = _block(D, max(16, 2048 // rows))
        return {"ROWS": rows, "BLOCK_N": block, "BLOCK_D": block_d, "num_warps": warps}, 1
    # Rows that are no multiple of 16 bytes take registers for addresses. Sigmoids and squares of unbounded logits need
    # a few more than eight warps have: both before sm_90, squares also since sm_100.
    parted = N % 8 != 0
    if loss == "cross_entropy":
        block, crowded = 4096 if parted else 8192, False
    else:
        block = 4096 if loss == "brier" or (loss == "bce" and arch.version < 90) else 8192
        crowded = parted or (loss != "brier" and arch.version < 90) or (loss == "mse" and arch.version >= 100)
    warps = 16 if crowded and arch.backend == "cuda" else 8
    block_d = _block(D, 2048)
    wanted = cdiv(2 * arch.processors, max(B, 1))
    return {"BLOCK_N": block, "BLOCK_D": block_d, "num_warps": warps}, min(wanted, cdiv(N, block), 64)


def _product(B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture) -> Options:
    """Choose the tile of a product of ``(B, D)`` and ``(N, D)``: BLOCK_M samples, BLOCK_N classes, BLOCK_K features."""
    wide = dtype == torch.float32
    block_m = 16 if B <= 16 else 32 if B <= 32 else 64 if B <= 64 or wide else 128
    if block_m == 128:
        block_n, block_k, warps = 128, 64, 8
    else:
        # Few rows: the weight is read once at memory speed, which takes many programs with deep queues of loads.
        block_n, block_k, warps = 64, 128, 4
        if wide:
            block_k = 32 if block_m == 64 else 64
        while block_n > 16 and cdiv(N, block_n) * cdiv(B, block_m) < arch.processors:
            block_n //= 2
    while block_k > 16 and block_k // 2 >= D:
        block_k //= 2
    stage = (block_m + block_n) * block_k * dtype.itemsize
    # AMD's pipeline keeps the stage after next in registers, so two stages take the shared memory of one.
    stages = 2 if arch.backend == "hip" else max(1, min(4, (arch.shared_memory - 4096) // stage))
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "PRECISION": _precision(dtype, arch),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _precision(dtype: torch.dtype, arch: Architecture) -> str:
    """Return the precision: three TF32 products keep float32 accuracy on NVIDIA's tensor cores; AMD's take float32."""
    return "tf32x3" if dtype == torch.float32 and arch.backend == "cuda" else "ieee"


def _parts(parts: int, block_m: int, warps: int) -> int:
    """Return how many partial moments to merge at once: four per thread, as more of nine numbers fill its registers."""
    return max(2, min(power_of_two(parts), 128 * warps // block_m))


def linear_contrast(B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture) -> tuple[Options, int]:
    """Choose for features ``(B, D)`` and weight ``(N, D)``; return also how many programs share a row in a 2nd launch.

    That launch turns logits into norms; with 0 the last tile of a row block to arrive does it. The tiles of ``GROUP_M``
    row blocks follow each other, so that they share the weight's tiles in the cache.
    """
    tile = _product(B, N, D, dtype, arch)
    block_m, warps = tile["BLOCK_M"], tile["num_warps"]
    # Logits of rows that are no multiple of 16 bytes are stored in parts, each with an address of its own.
    parted = N * dtype.itemsize % 16 != 0
    if parted:
        tile["BLOCK_N"] = max(16, tile["BLOCK_N"] // 2)
    tiles_m, tiles_n = cdiv(B, block_m), cdiv(N, tile["BLOCK_N"])
    # One program converts some 64 thousand logits in a few microseconds; more are shared between programs.
    shared = block_m * N > 1 << 16
    # Rows that are finished together, and columns per step, so few that the product's operands and the step's values
    # stay in the registers.
    rows = 1 if shared else block_m
    block_f = (512 if rows == 1 or (90 <= arch.version < 100 and not parted) else 256) * warps // rows
    block_f = max(16, min(power_of_two(N), block_f))
    chunks = min(cdiv(N, block_f), cdiv(2 * arch.processors, max(B, 1))) if shared else 0
    parts = _parts(tiles_n, rows, warps)
    if arch.backend == "cuda" and arch.version >= 100:
        # Two per thread, beside the product's addresses; one beside float32's three pairs of operands.
        parts = max(2, parts // (4 if dtype == torch.float32 else 2))
    # Whether the product's loads give the features' norms.
    in_loop = block_m <= 32 or tiles_n <= 4
    tile |= {"PARTS": parts, "GROUP_M": min(8, tiles_m), "BLOCK_F": block_f, "NORM_IN_LOOP": in_loop}
    return tile, chunks


def linear_stats(
    B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture, loss: str = "cross_entropy"
) -> tuple[Options, int]:
    """Choose for features ``(B, D)`` and weight ``(N, D)`` if only statistics over the contrasts are wanted.

    Return also how many tiles a program walks through.
    """
    tile = _product(B, N, D, dtype, arch)
    block_m = tile["BLOCK_M"]
    if arch.backend == "cuda":
        before, after = arch.version < 90, arch.version >= 100
        if block_m == 128:
            # Moments of wider tiles do not fit the registers: before sm_90 the product's operands take many, and since
            # sm_100 a thread holds whole rows, where brier has twice the moments. Triton before 3.9 lacks some for bce.
            if before or after or loss in ("mse", "bce"):
                tile["BLOCK_N"] = 32 if loss == "brier" and after else 64
        elif block_m == 64 and dtype == torch.float32:
            # The three products of float32 hold three pairs of operands, and brier twice the moments beside them.
            if not before:
                tile["BLOCK_N"] = min(tile["BLOCK_N"], 32)
            if loss == "brier" and (before or after):
                tile["num_warps"] = 8
        elif block_m == 16 and before and loss == "bce":
            tile["BLOCK_K"] = min(tile["BLOCK_K"], 64)
    tiles_m, tiles_n = cdiv(B, block_m), cdiv(N, tile["BLOCK_N"])
    per_split = max(1, tiles_n * tiles_m // (4 * arch.processors))
    tile["PARTS"] = _parts(cdiv(tiles_n, per_split), block_m, tile["num_warps"])
    return tile, per_split


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

    The accumulator is the whole of a program's state, so it is as large as registers allow; float32 operands
    take twice the space and, with IEEE products, no tensor cores.
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
