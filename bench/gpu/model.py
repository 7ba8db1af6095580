"""Predict how long a launch takes from counts that need no device; ``gpu.sh`` divides the measured time by it.

    launch + a program's own chain + the longest of: bytes over bandwidth, instructions over issue slots, products

Nothing here has been fitted to a measurement. A kernel that takes twice as long proves the model wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastgrad.ops import tune
from fastgrad.ops.tune import cdiv


class Rates(NamedTuple):
    """What a device does in a microsecond: bytes, cycles, and half-precision products of its matrix units."""

    bytes: float
    cycles: float
    products: float


#: 85 to 90 % of the bandwidth on the data sheet, and 60 % of its products.
RATES = {
    "sm_80": Rates(1.4e6, 1400, 0.3 * 312e6),
    "sm_90": Rates(3.0e6, 1750, 0.3 * 989e6),
    "sm_100": Rates(7.0e6, 1850, 0.3 * 2250e6),
}
#: Microseconds of a launch within a graph, and of one program's loads, reductions and stores, which nothing hides.
LAUNCH, CHAIN = tune.LAUNCH, tune.PROGRAM
#: Threads, registers and programs that a processor holds; those with less shared memory hold fewer threads.
WARPS, FEWER_WARPS, REGISTERS, PROGRAMS = 64, 48, 1 << 16, 32


def steps(kernel: str, given: Mapping[str, Any]) -> int:
    """Return the iterations that a program makes one after another; a product and its moments are one."""
    classes = given.get("N", given.get("N_units", 0) * given.get("ALIGN_N", 1))
    if kernel == "linear_stats_kernel":
        return int(given["tiles_per_split"])
    if kernel in ("contrast_moments_kernel", "contrast_finish_kernel"):
        return cdiv(given["chunk_n"], given["BLOCK_N"]) + (kernel == "contrast_finish_kernel")
    if kernel in ("contrast_stream_kernel", "target_sqnorm_kernel"):
        return 2 * cdiv(classes, given["BLOCK_N"])
    return 1


def costs(row: Mapping[str, Any], programs: int, given: Mapping[str, Any], products: int) -> dict[str, Any]:
    """Return programs, waves, serial steps and, for devices with `RATES`, microseconds of a launch.

    ``row`` is the launch's in the compile report, and ``given`` its arguments by name.
    """
    arch, kernel = tune.KNOWN_ARCHITECTURES[row["arch"]], row["kernel"]
    found: dict[str, Any] = {"programs": programs, "steps": steps(kernel, given), "waves": None, "us": None}
    if arch.backend != "cuda":
        return found
    warps = WARPS if arch.shared_memory > 100 << 10 else FEWER_WARPS
    resident = min(
        REGISTERS // (cdiv(row["registers"], 8) * 8 * 32 * row["warps"]), warps // row["warps"], PROGRAMS,
        arch.shared_memory // max(row["shared"] + 1024, 1),
    )  # fmt: skip
    found["waves"] = round(programs / (arch.processors * max(resident, 1)), 2)
    if row["arch"] in RATES and kernel.startswith(("contrast", "target", "linear", "stats")):
        rate = RATES[row["arch"]]
        moved = sum({id(t): t.nbytes for t in given.values() if isinstance(t, Tensor)}.values())
        # A processor may take up to 1.5 times its share of the bandwidth.
        share = min(1.0, 1.5 * programs / arch.processors)
        issued = row["instructions"] * row["warps"] * programs * max(1, found["steps"] / 2)
        busy = arch.processors * min(1.0, programs / arch.processors)
        work = [moved / rate.bytes / share, products / rate.products * (6 if "fp32" in row["case"] else 1)]
        if kernel != "linear_stats_kernel":
            work.append(issued / (4 * rate.cycles * busy))
        found["us"] = round(LAUNCH + CHAIN + max(work), 1)
    return found
