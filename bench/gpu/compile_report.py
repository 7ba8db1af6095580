"""Compile every kernel for GPUs that this machine need not have, and read the machine code.

    python -m bench.gpu.compile_report                        # table on the terminal
    python -m bench.gpu.compile_report --out                  # also bench/results/compile.json and compile.md
    python -m bench.gpu.compile_report --only contrast --arch sm_90

A case calls a launcher on meta tensors. Triton compiles each launch as it would on a device, but does not run it. The
table's figures are read from the machine code.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

if os.environ.get("TRITON_INTERPRET") == "1":
    raise ImportError("kernels are compiled in a process without TRITON_INTERPRET=1, which would interpret them")

# Triton 3.4 needs ROCm's linker, which later versions include. Only the assembly is read here, which comes before it.
os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "")

import triton
from triton.backends.compiler import GPUTarget

from bench.gpu.compile_cases import as_if_on, cases
from bench.gpu.model import costs, fused
from bench.report import pages
from bench.report.text import table
from fastgrad.ops import tune

#: Kernels whose products must run on the matrix units.
PRODUCTS = {"direct_kernel", "gram_kernel"}
#: Kernels or kinds of results that write whole rows; the others write one number per row or tile.
WIDE_STORES = {"contrast_rows_kernel", "contrasts"}
#: What is read from machine code: the largest number after a word, and how often a word occurs.
LARGEST = {
    "cubin": {"registers": r"\bREG:(\d+)", "local": r"\b(?:STACK|LOCAL):(\d+)"},
    # Scalar registers spill into lanes of vector registers; "local" counts what goes to memory.
    "amdgcn": {
        "registers": r"\.vgpr_count:\s+(\d+)", "spills": r"\.vgpr_spill_count:\s+(\d+)",
        "local": r"\.private_segment_fixed_size:\s+(\d+)",
    },
}  # fmt: skip
COUNTED = {
    "cubin": {
        "spills": r"\b(?:LDL|STL)\b",
        # Asynchronous copies to shared memory are loads too.
        "wide_loads": r"\b(?:LDG\.E\S*\.128|LDGSTS\S*\.128|UTMALDG|LDG\.E\S*\.ENL2\.256)",
        "wide_stores": r"\b(?:STG\.E\S*\.128|UTMASTG|STG\.E\S*\.ENL2\.256)",
        "matrix": r"\b(?:HMMA|HGMMA|QGMMA|UTC\w*MMA)\b",
        "instructions": r"/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S",
        "exponentials": r"\bMUFU\.EX2\b",
        "roundings": r"\bFRND\b",
        "barriers": r"\bBAR\.(?:SYNC|RED)",
    },
    "amdgcn": {
        "wide_loads": r"\b(?:global|buffer|flat)_load_(?:dwordx4|b128)",
        "wide_stores": r"\b(?:global|buffer|flat)_store_(?:dwordx4|b128)",
        "matrix": r"\bv_mfma",
        "instructions": r"(?m)^\t[a-z]\w+",
        "exponentials": r"\bv_exp_f32",
        "roundings": r"\bv_(?:rndne|floor)_f32",
        "barriers": r"\bs_barrier",
    },
}
TARGETS = {
    name: GPUTarget(arch.backend, name if arch.backend == "hip" else arch.version, arch.threads)
    for name, arch in tune.KNOWN_ARCHITECTURES.items()
}


class Launch(NamedTuple):
    """A compiled kernel, the number of its programs, and its arguments by name."""

    kernel: Any
    programs: int
    given: dict[str, Any]


def compiled(call: Callable[[], object], arch: str) -> list[Launch]:
    """Return the launches of a call on an architecture, compiled by Triton's own launcher."""
    JITFunction, launches = triton.runtime.jit.JITFunction, []
    run = JITFunction.run

    def compile_alone(function: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        kernel = run(function, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(kernel, grid[0], dict(zip(function.arg_names, args, strict=False)) | options))

    device = {"current_device": arch, "current_stream": None, "current_target": TARGETS[arch]}
    driver = mock.Mock(**{f"get_{name}.return_value": value for name, value in device.items()})
    triton.runtime.driver.set_active(driver)
    with as_if_on(tune.KNOWN_ARCHITECTURES[arch]), mock.patch.object(JITFunction, "run", compile_alone):
        call()
    return launches


def read(asm: Mapping[str, Any]) -> dict[str, int]:
    """Return the figures of `LARGEST` and `COUNTED` in a kernel's machine code."""
    kind = "amdgcn" if "amdgcn" in asm else "cubin"
    code = asm["amdgcn"] if kind == "amdgcn" else _disassembled(asm["cubin"])
    row = {name: max(map(int, re.findall(pattern, code)), default=0) for name, pattern in LARGEST[kind].items()}
    return row | {name: len(re.findall(pattern, code)) for name, pattern in COUNTED[kind].items()}


def _disassembled(cubin: bytes) -> str:
    # The tool ships with Triton.
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([tool, "-res-usage", "-sass", file.name], text=True)


def faults(row: dict[str, Any], wide: bool, given: dict[str, Any]) -> list[str]:
    """Return which promises about kernels a row breaks; ``wide``: rows are moved 16 bytes at a time."""
    found = []
    if row["spills"] or row["local"]:
        found.append(f"{row['spills']} spills, {row['local']} bytes of local memory")
    limit = tune.KNOWN_ARCHITECTURES[row["arch"]].shared_memory
    if row["shared"] > limit:
        found.append(f"{row['shared']} of {limit} bytes of shared memory")
    if row["kernel"] in PRODUCTS and not row["matrix"]:
        found.append("no matrix instruction")
    if wide and not row["wide_loads"] and given.get("TILED", True):
        found.append("no 16-byte load")
    rows = "out_ptr" in given and given.get("KIND", row["kernel"]) in WIDE_STORES
    numbers = given.get("ROWS", 1) * given.get("BLOCK_N", 0) // row["warps"]
    if wide and rows and numbers >= 4 * tune.KNOWN_ARCHITECTURES[row["arch"]].threads and not row["wide_stores"]:
        found.append("no 16-byte store")
    return found


def report(only: str, archs: list[str], quick: bool) -> list[dict[str, Any]]:
    """Compile the cases whose name matches ``only`` somewhere; return a row for each launch."""
    rows: list[dict[str, Any]] = []
    # Disassembling takes time, and many launches share a kernel.
    found: dict[str, dict[str, int]] = {}
    wanted = [case for case in cases() if re.search(only, case.name) and (case.quick or not quick)]
    for arch, case in itertools.product(archs, wanted):
        if case.products and not tune.KNOWN_ARCHITECTURES[arch].multiplies:
            continue
        print(f"{arch} {case.name}", file=sys.stderr)
        first = len(rows)
        for kernel, programs, given in compiled(case.call, arch):
            if kernel.hash not in found:
                found[kernel.hash] = read(kernel.asm)
            row: dict[str, Any] = {"case": case.name, "kernel": kernel.name, "arch": arch}
            row |= {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared, **found[kernel.hash]}
            row |= costs(row, programs, given)
            row["per_row"] = row["instructions"] * row["warps"] / given["ROWS"] if "ROWS" in given else None
            row["faults"] = faults(row, case.wide, given)
            rows.append(row)
            for fault in row["faults"]:
                print(f"FAULT {arch} {case.name} {kernel.name}: {fault}", file=sys.stderr)
        times = [row["us"] for row in rows[first:]]
        for row in rows[first:]:
            row["call_us"] = None if None in times else round(sum(times), 1)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", help="a regular expression that the names of cases match")
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="may be repeated; default all")
    parser.add_argument("--quick", action="store_true", help="one case of each kernel")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", action="store_true", help="write bench/results/compile.json and its page")
    options = parser.parse_args()
    if options.out and (options.only or options.arch or options.quick):
        parser.error("--out writes the whole table: leave out --only, --arch and --quick")
    rows = report(options.only, options.arch or list(TARGETS), options.quick)
    print(json.dumps({"rows": rows}, indent=1) if options.json else table(rows))
    if options.out:
        pages.save("compile", rows, packages=("triton", "torch"), facts={"fused": list(fused())})


if __name__ == "__main__":
    main()
