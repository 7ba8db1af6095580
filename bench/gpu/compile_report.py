"""Compile every kernel for GPUs that need not be there, and read what came out of it.

    python -m bench.gpu.compile_report                        # table on the terminal
    python -m bench.gpu.compile_report --out                  # also bench/results/compile.json and compile.md
    python -m bench.gpu.compile_report --only contrast --arch sm_90

A case calls a launcher on meta tensors, which have a shape but no memory. The launches it makes are caught before they
reach a device, and each is compiled exactly as it would be launched. Registers, spills, memory, the widest loads and
stores and the matrix instructions are then read from the machine code.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bench.gpu.compile_cases import QUICK, cases
from bench.gpu.compiler import TARGETS, compiled, launches
from bench.report import pages
from bench.report.text import table
from fastgrad.ops import tune

Row = dict[str, Any]
#: Kernels whose products must run on the matrix units.
PRODUCTS = {"linear_contrast_kernel", "linear_stats_kernel", "direct_kernel", "gram_kernel"}
#: Kernels that write whole rows; the others write one number per row or tile, or, on AMD, a tile of a product straight
#: from the layout of the matrix units.
WIDE_STORES = {"contrast_rows_kernel", "contrast_stream_kernel", "contrast_finish_kernel"}


def faults(row: Row, wide: bool) -> list[str]:
    """Return what a row does not keep of the promises made for every kernel; ``wide``: rows are whole 16 bytes."""
    found = []
    if row["spills"] or row["local"]:
        found.append(f"{row['spills']} spills, {row['local']} bytes of local memory")
    limit = tune.KNOWN_ARCHITECTURES[row["arch"]].shared_memory
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, {limit} there")
    if row["kernel"] in PRODUCTS and not row["matrix"]:
        found.append("no matrix instruction")
    if wide and not row["wide_loads"]:
        found.append("no 16-byte load")
    tile = row["kernel"] == "linear_contrast_kernel" and not row["arch"].startswith("gfx")
    if wide and not row["wide_stores"] and (tile or row["kernel"] in WIDE_STORES):
        found.append("no 16-byte store")
    return found


def report(only: str = "", archs: tuple[str, ...] = tuple(TARGETS), quick: bool = False) -> list[Row]:
    """Compile the cases whose name contains ``only``; equal launches are compiled once."""
    rows, seen = [], set()
    for case in cases():
        if only not in case.name or (quick and case.name not in QUICK):
            continue
        for arch in archs:
            for launch in launches(case.call, arch):
                source, options = launch
                key = (arch, source.hash(), str(options))
                if key in seen:
                    continue
                seen.add(key)
                print(f"{arch} {case.name} {source.name}", file=sys.stderr)
                try:
                    row = {"case": case.name, "kernel": source.name, "arch": arch, **compiled(launch, arch)}
                except Exception as error:
                    raise RuntimeError(f"{case.name} does not compile for {arch}") from error
                rows.append(row | {"faults": faults(row, case.wide)})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="may be repeated; default all")
    parser.add_argument("--quick", action="store_true", help="the cases of QUICK alone")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", action="store_true", help="write bench/results/compile.json and its page")
    options = parser.parse_args()
    if options.out and (options.only or options.arch or options.quick):
        parser.error("--out writes the whole table: leave out --only, --arch and --quick")
    rows = report(options.only, tuple(options.arch or TARGETS), options.quick)
    print(json.dumps({"rows": rows}, indent=1) if options.json else table(rows))
    if options.out:
        rows.sort(key=lambda row: list(TARGETS).index(row["arch"]))
        pages.save("compile", rows, packages=("triton", "torch"))


if __name__ == "__main__":
    main()
