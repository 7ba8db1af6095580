"""Launch configuration of the kernel of the channel moments, pinned like the others through ``heuristics.override``."""

from __future__ import annotations

from dataclasses import dataclass

from fastgrad.ops.heuristics import Architecture, _pinned, cdiv, power_of_two

#: Numbers a program holds of each moment: eight in each of 128 threads, one 16-byte access of half precision.
TILE = 1024
#: Loads a program has under way at once.
UNROLL = 4
#: Partial sums that are added one after the other; of so few the rounding errors stay a few units.
LONGEST_SUM = 64


@dataclass(frozen=True)
class ChannelConfig:
    """How ``channel_moments`` runs.

    Attributes:
        block_c, block_t: Tile of channels and positions.
        unroll: Tiles in a row whose sums are added up before they join the program's.
        splits: Programs that share the positions of a channel.
        num_warps: Of a program.
    """

    block_c: int
    block_t: int
    unroll: int
    splits: int
    num_warps: int


def channel_moments(B: int, C: int, T: int, channels_last: bool, arch: Architecture) -> ChannelConfig:
    """Choose for ``(B, C, T)``, whose neighbours in memory are channels if ``channels_last``, else positions.

    A tile is long where memory is: whole cache lines of channels or of positions. Positions are shared out until the
    device is full, and where one program would add up too many tiles.
    """
    pinned: ChannelConfig | None = _pinned("channel_moments")
    if pinned is not None:
        return pinned
    if channels_last:
        block_c = min(power_of_two(C), 128)
        block_t = min(power_of_two(T), TILE // block_c)
        block_c = min(power_of_two(C), TILE // block_t)
    else:
        block_t = min(power_of_two(T), TILE // 2)
        block_c = min(power_of_two(C), TILE // block_t)
    unroll = min(UNROLL, power_of_two(cdiv(T, block_t)))
    steps = cdiv(T, block_t * unroll)
    programs = B * cdiv(C, block_c)
    splits = min(steps, max(cdiv(steps, LONGEST_SUM), cdiv(4 * arch.processors, programs)))
    splits = cdiv(steps, cdiv(steps, splits))
    threads = 64 if arch.backend == "hip" else 32
    warps = max(1, min(4, block_c * block_t // (8 * threads)))
    return ChannelConfig(block_c, block_t, unroll, splits, warps)
