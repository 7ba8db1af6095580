"""Launch configurations of the layer kernels, pinned like the others through ``heuristics.override``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgrad.ops.heuristics import Architecture, _precision, pinnable


@dataclass(frozen=True)
class DirectConfig:
    """Tile of the weight gradient one program owns, positions per step."""

    block_o: int
    block_c: int
    block_t: int
    precision: str
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GramConfig:
    """Positions per side of a tile, channels per step."""

    block_t: int
    block_k: int
    precision: str
    num_warps: int
    num_stages: int


def _block(size: int, largest: int) -> int:
    """The power of two from 16 to ``largest`` that covers ``size``, if one does."""
    block = 16
    while block < min(size, largest):
        block *= 2
    return block


@pinnable
def layer_direct(C: int, O: int, T: int, dtype: torch.dtype, arch: Architecture) -> DirectConfig:  # noqa: E741
    """Choose for C input and O output channels per group and T positions.

    The accumulator is the whole of a program's state, so it is as large as registers allow; float32 operands
    take twice the room and, with IEEE products, no tensor cores.
    """
    wide = dtype == torch.float32
    block_o, block_c = _block(O, 64 if wide else 128), _block(C, 64 if wide else 128)
    # Below 32 positions a step of half-precision operands has less than 16 bytes for every thread.
    block_t = (16 if max(block_o, block_c) == 64 else 32) if wide else max(32, _block(T, 64))
    warps = 8 if block_o * block_c > 64 * 64 else 4
    return DirectConfig(
        block_o, block_c, block_t, _precision(dtype, arch), warps, 2 if arch.backend == "hip" else 3
    )


@pinnable
def layer_gram(T: int, dtype: torch.dtype, arch: Architecture) -> GramConfig:
    """Choose for T positions."""
    wide = dtype == torch.float32
    # Two accumulators of block_t x block_t.
    block_t = _block(T, 32 if wide else 64)
    return GramConfig(
        block_t, 32 if wide else 64, _precision(dtype, arch), 4, 2 if arch.backend == "hip" else 3
    )


@pinnable
def layer_prefers_gram(C: int, O: int, T: int) -> bool:  # noqa: E741
    """Whether the symmetric half of ``T^2 (C + O)`` products is below a quarter of the direct route's ``T C O``."""
    return 2 * T * (C + O) < C * O
