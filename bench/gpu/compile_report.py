"""Compile every kernel for GPUs that need not be there, and read what came out of it.

    python -m bench.gpu.compile_report                        # table on the terminal
    python -m bench.gpu.compile_report --out                  # also bench/results/compile.json and compile.md
    python -m bench.gpu.compile_report --only contrast --arch sm_90

A case calls a launcher on meta tensors, which have a shape but no memory. The launches it makes are caught before
they reach a device, and each is compiled exactly as it would be launched: same configuration, same constants, same
facts about divisibility. Registers, spills, local and shared memory, the widest loads and stores and the matrix
instructions are then read from the machine code: the cubin, through the tools that ship with Triton, or AMD's
assembly.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

import torch
import triton

from bench.gpu import machine_code
from bench.gpu.compile_cases import QUICK, Case, cases
from bench.gpu.compiler import TARGETS, Launch, compile_launch, launches
from bench.results_file import RESULTS
from fastgrad.ops import tune


@dataclasses.dataclass(frozen=True)
class Row:
    """What was read from the machine code of one kernel."""

    case: str
    kernel: str
    arch: str
    warps: int
    registers: int
    spills: int
    local: int
    shared: int
    wide_loads: int
    wide_stores: int
    matrix: int
    instructions: int
    expects_matrix: bool
    expects_wide: bool


# Kernels whose products must run on the matrix units.
PRODUCTS = {
    "linear_contrast_kernel", "linear_stats_kernel", "direct_kernel", "gram_kernel",
}  # fmt: skip
# Kernels that write whole rows; the others write one number per row or tile, or, on AMD, a tile of a product straight
# from the layout of the matrix units.
WIDE_STORES = {"contrast_rows_kernel", "contrast_stream_kernel", "contrast_finish_kernel"}


def read(case: Case, one: Launch, arch: str) -> Row:
    """Compile one launch and read its machine code."""
    compiled = compile_launch(one, arch)
    return Row(
        case=case.name, kernel=one.kernel.__name__, arch=arch, warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared, expects_matrix=one.kernel.__name__ in PRODUCTS,
        expects_wide=case.wide, **machine_code.read(compiled.asm),
    )  # fmt: skip


def faults(row: Row) -> list[str]:
    """What a row does not keep of the promises made for every kernel."""
    found = []
    if row.spills or row.local:
        found.append(f"{row.spills} spills, {row.local} bytes of local memory")
    limit = tune.KNOWN_ARCHITECTURES[row.arch].shared_memory
    if row.shared > limit:
        found.append(f"{row.shared} bytes of shared memory, {limit} there")
    if row.expects_matrix and not row.matrix:
        found.append("no matrix instruction")
    if row.expects_wide and not row.wide_loads:
        found.append("no 16-byte load")
    wide_stores = row.kernel in WIDE_STORES or (
        row.kernel == "linear_contrast_kernel" and not row.arch.startswith("gfx")
    )
    if row.expects_wide and not row.wide_stores and wide_stores:
        found.append("no 16-byte store")
    return found


def as_json(rows: list[Row]) -> str:
    """The rows with their faults and the versions they belong to."""
    listed = [dataclasses.asdict(row) | {"faults": faults(row)} for row in rows]
    return json.dumps({"triton": triton.__version__, "torch": torch.__version__, "rows": listed}, indent=1)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = (
        "case | kernel | arch | warps | registers | spills | local B | shared B | 16 B loads | 16 B stores | "
        "matrix instr. | instructions | faults"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for r in rows:
        cells = (
            r.case, r.kernel, r.arch, r.warps, r.registers, r.spills, r.local, r.shared, r.wide_loads, r.wide_stores,
            r.matrix, r.instructions, "; ".join(faults(r)) or "none",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def report(only: str = "", archs: tuple[str, ...] = tuple(TARGETS), quick: bool = False) -> list[Row]:
    """Compile the cases whose name contains ``only``; equal launches are compiled once."""
    rows = []
    seen = set()
    for case in cases():
        if only not in case.name or (quick and case.name not in QUICK):
            continue
        for arch in archs:
            for one in launches(case.call, arch):
                key = (
                    one.kernel.__name__,
                    arch,
                    str((one.signature, one.constants, one.attributes, one.options)),
                )
                if key not in seen:
                    seen.add(key)
                    try:
                        rows.append(read(case, one, arch))
                    except Exception as error:
                        raise RuntimeError(f"{case.name} does not compile for {arch}") from error
                    print(f"{arch} {case.name} {one.kernel.__name__}", file=sys.stderr)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="may be repeated; default all")
    parser.add_argument("--quick", action="store_true", help="the cases of QUICK alone")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out", action="store_true", help=f"write compile.json and compile.md to {RESULTS.name}/"
    )
    options = parser.parse_args()
    rows = report(options.only, tuple(options.arch or TARGETS), options.quick)
    print(as_json(rows) if options.json else table(rows))
    if options.out:
        write(rows)


def write(rows: list[Row]) -> None:
    """Put rows into ``bench/results/compile.{json,md}``; those of the same compiler for other cases stay."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "compile.json"
    order = {case.name: i for i, case in enumerate(cases())}
    kept: dict[tuple[str, str, str, int], Row] = {}
    before = json.loads(path.read_text()) if path.exists() else {"triton": None}
    old = [Row(**{f.name: row[f.name] for f in dataclasses.fields(Row)}) for row in before.get("rows", [])]
    fresh = {(row.case, row.arch) for row in rows}
    old = [row for row in old if before["triton"] == triton.__version__ and (row.case, row.arch) not in fresh]
    for row in old + rows:
        if row.case in order:
            same = sum(key[:3] == (row.case, row.kernel, row.arch) for key in kept)
            kept[row.case, row.kernel, row.arch, same] = row
    ordered = sorted(kept.values(), key=lambda row: (list(TARGETS).index(row.arch), order[row.case]))
    path.write_text(as_json(ordered) + "\n")
    (RESULTS / "compile.md").write_text(
        f"# Kernels as compiled by Triton {triton.__version__}\n\n"
        "Made by `python -m bench.gpu.compile_report --out`; no GPU is needed. Registers are per thread. A fault is a "
        "spill, local memory, too much shared memory, a product without matrix instructions, or rows of whole 16 "
        "bytes read or written in smaller pieces.\n\n" + table(ordered) + "\n"
    )


if __name__ == "__main__":
    main()
