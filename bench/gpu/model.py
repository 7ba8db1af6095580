"""Predict how long a launch takes from counts that need no device; ``gpu.sh`` divides the measured time by it.

    launch + a program's own chain + the longest of: bytes over bandwidth, the same of the cache, instructions over
    issue slots, and the chains of further waves

A chain is a program's loads, reductions and stores, and every step of the loop over D is another load that waits.
Nothing here has been fitted to a measurement. A kernel that takes twice as long proves the model wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any, NamedTuple

from torch import Tensor

from fastgrad.ops import tune
from fastgrad.ops.tune import cdiv


class Rates(NamedTuple):
    """What a device does in a microsecond, and the bytes that its cache holds.

    Bytes of memory and of the cache, cycles, and half-precision products of its matrix units.
    """

    bytes: float
    cached: float
    cycles: float
    products: float
    cache: int


#: 85 to 90 % of the bandwidth on the data sheet, 60 % of its products, and published measurements of the caches.
RATES = {
    "sm_75": Rates(0.27e6, 1.2e6, 1300, 0.3 * 65e6, 4 << 20),
    "sm_80": Rates(1.4e6, 4.0e6, 1400, 0.3 * 312e6, 40 << 20),
    "sm_90": Rates(3.0e6, 5.7e6, 1750, 0.3 * 989e6, 50 << 20),
    "sm_100": Rates(7.0e6, 17.5e6, 1850, 0.3 * 2250e6, 126 << 20),
}
#: Microseconds of a launch within a graph, of a program that loads once, and of each further load that waits.
LAUNCH, PROGRAM, LOAD = 2.0, 1.0, 0.5
#: Threads, registers and programs that a processor holds; those with less shared memory hold fewer threads.
WARPS, FEWER_WARPS, REGISTERS, PROGRAMS = 64, 48, 1 << 16, 32


def steps(given: Mapping[str, Any]) -> int:
    """Return the loads of features that a program makes one after another, at least 1."""
    return max(1, cdiv(given.get("chunk_d", given.get("D", 1)), given.get("BLOCK_D", 1)))


def costs(row: Mapping[str, Any], programs: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return programs, waves, serial loads and, for devices with `RATES`, microseconds of a launch.

    ``row`` is the launch's in the compile report, and ``given`` its arguments by name.
    """
    arch = tune.KNOWN_ARCHITECTURES[row["arch"]]
    last_layer = "LOSS" in given
    found: dict[str, Any] = {
        "programs": programs, "steps": steps(given) if last_layer else None, "waves": None, "us": None
    }  # fmt: skip
    if arch.backend != "cuda":
        return found
    warps = 32 if arch.version == 75 else WARPS if arch.shared_memory > 100 << 10 else FEWER_WARPS
    resident = min(
        REGISTERS // (cdiv(row["registers"], 8) * 8 * 32 * row["warps"]), warps // row["warps"], PROGRAMS,
        arch.shared_memory // max(row["shared"] + 1024, 1),
    )  # fmt: skip
    waves = programs / (arch.processors * max(resident, 1))
    found["waves"] = round(waves, 2)
    if row["arch"] in RATES and last_layer:
        rate = RATES[row["arch"]]
        sizes = {name: t.nbytes for name, t in given.items() if isinstance(t, Tensor)}
        labels = given.get("y_ptr")
        if labels is None or labels is given["z_ptr"]:
            sizes.pop("y_ptr", None)
        if given.get("TILED") is False:
            sizes.pop("z_ptr")  # a few logits of a row
        # What the launch before has read or written is in the cache, as far as it fits.
        again = sum(sizes[n] for n in ("z_ptr", "work_ptr") if n in sizes) if "PARTS" in given else 0
        held = min(again, rate.cache // 2)
        # Every program of a row reads all parts of it.
        parts = programs * given["PARTS"] * 20 if "PARTS" in given else 0
        moved = sum(sizes.values())
        # A processor may take up to 1.5 times its share of the bandwidth.
        share = min(1.0, 1.5 * programs / arch.processors)
        chain = PROGRAM + LOAD * (found["steps"] - 1)
        busy = arch.processors * min(1.0, programs / arch.processors)
        work = max(
            (moved - held) / rate.bytes / share,
            (moved + parts) / rate.cached / share,
            row["instructions"] * row["warps"] * programs / (4 * rate.cycles * busy),
            chain * (ceil(waves) - 1),
        )
        found["us"] = round(LAUNCH + chain + work, 1)
    return found


def product(B: int, N: int, D: int, arch: str, tile: tuple[int, int], written: bool) -> float:
    """Return microseconds of a product of bfloat16 ``(B, D)`` and ``(N, D)`` by tiles, whose result may be written.

    Tiles of the result are made from rows and columns that come from the cache once for each tile.
    """
    rate, (rows, cols) = RATES[arch], tile
    moved = 2 * (N * D + B * D + (B * N if written else 0))
    through = 2 * cdiv(B, rows) * cdiv(N, cols) * (min(rows, B) + cols) * D
    return LAUNCH + max(moved / rate.bytes, through / rate.cached, B * N * D / rate.products)


def fused() -> Iterator[dict[str, Any]]:
    """Yield the times of statistics from features and weight: fused with the product, and after a product.

    A fused product has tiles of 128 x 128 at most, as a tile's statistics need registers too, and then takes as long
    for a tile's exponentials and sums as 60 instructions a logit; a library's tiles are 128 x 256.
    """
    for arch, rate in RATES.items():
        if rate.products < 90e6:
            continue
        for B in (8, 64, 1024):
            N, D = 128256, 4096
            epilogue = 60 * B * N / 32 / (4 * rate.cycles * tune.KNOWN_ARCHITECTURES[arch].processors)
            one = product(B, N, D, arch, (128, 128), False) + (0 if B <= 64 else epilogue)
            two = product(B, N, D, arch, (128, 256), True) + 2 * (LAUNCH + PROGRAM) + 4 * B * N / rate.cached
            if rate.cache < 4 * B * N:
                two += 4 * B * N / rate.bytes - 4 * B * N / rate.cached
            yield {
                "arch": arch,
                "B": B,
                "N": N,
                "D": D,
                "fused us": round(one),
                "product, then statistics us": round(two),
            }
