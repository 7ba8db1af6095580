"""Compile every kernel for GPUs that need not be there, and read what came out of it.

    python -m bench.compile_report                        # table on the terminal
    python -m bench.compile_report --out                  # also bench/results/compile.json and compile.md
    python -m bench.compile_report --only contrast --arch sm_90

A case calls a launcher on meta tensors, which have a shape but no memory. The launches it makes are caught before
they reach a device, and each is compiled exactly as it would be launched: same heuristics, same constants, same
facts about divisibility. Registers, spills, local and shared memory, the widest loads and stores and the matrix
instructions are then read from the machine code: the cubin, through the tools that ship with Triton, or AMD's
assembly.

To add a kernel, append a ``Case`` to ``cases()`` and its most telling one to ``QUICK``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise ImportError(
        "bench.compile_report needs the compiler: run it in a process without TRITON_INTERPRET=1"
    )

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgrad.ops import heuristics
from fastgrad.ops.triton import launch

RESULTS = pathlib.Path(__file__).parent / "results"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        name: What the table says; starts with the operator's name.
        call: Runs the launcher on meta tensors.
        product: Whether matrix instructions must appear.
        wide: Whether 16-byte loads and stores must appear; they need rows of a multiple of 16 bytes.
    """

    name: str
    call: Callable[[], object]
    product: bool = False
    wide: bool = True


@dataclasses.dataclass(frozen=True)
class Launch:
    """A caught launch: what the compiler needs to know of it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


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


# One case for each kernel: what every test run compiles.
QUICK = (
    "contrast_sqnorm B=4096 N=1000 D=512 bf16 cross_entropy",
    "contrast_sqnorm B=4096 N=262144 D=4096 bf16 cross_entropy",
    "contrast_sqnorm B=8 N=131072 D=4096 bf16 brier log",
    "linear_contrast_sqnorm B=1024 N=32000 D=4096 bf16 brier",
    "linear_contrast_stats B=1024 N=128256 D=4096 bf16 bce",
    "target_sqnorm B=4096 N=1000 D=512 bf16 soft brier",
    "contrast_rows_linear B=1024 N=1000 D=2048 U=300 bf16",
    "conv_sqnorm B=64 64 to 64 32x32 kernel 3 stride 1 bf16",
    "linear_sqnorm B=64 T=196 C=768 O=3072 bf16",
    "channel_moments B=32 C=256 T=784 bf16 contiguous",
    "channel_moments B=32 C=768 T=197 bf16 channels last",
)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> list[Case]:
    """The shapes that the heuristics treat differently, for every kernel."""
    from fastgrad.ops.triton import channel_moments, contrast, layer_sqnorm, linear_contrast, rows, target

    losses = ("cross_entropy", "bce", "mse", "brier")
    half, single = torch.bfloat16, torch.float32
    found: list[Case] = []

    def contrasts(B: int, N: int, D: int, dtype: torch.dtype, loss: str, log: bool, **kinds: bool) -> None:
        found.append(
            Case(
                f"contrast_sqnorm B={B} N={N} D={D} {DTYPES[dtype]} {loss}{' log' if log else ''}",
                lambda: contrast.contrast_sqnorm(
                    meta(B, D, dtype=dtype), meta(B, N, dtype=dtype), loss, True, log, False
                ),
                **kinds,
            )
        )

    for loss in losses:
        contrasts(4096, 1000, 512, half, loss, False)
        contrasts(4096, 1000, 512, half, loss, True)
        contrasts(4096, 8192 if loss == "brier" else 16384, 4096, single, loss, False)
        contrasts(4096, 262144, 4096, half, loss, False)
        contrasts(8, 131072, 4096, half, loss, True)
    for N, dtype in ((16, single), (128, half), (1000, single), (4096, half), (8192, single)):
        contrasts(4096, N, 512, dtype, "cross_entropy", False)
    contrasts(4096, 10, 512, single, "cross_entropy", False, wide=False)

    def linear(
        B: int, N: int, D: int, dtype: torch.dtype, loss: str, log: bool, stats: bool, **kinds: bool
    ) -> None:
        x, w, b = (meta(B, D, dtype=dtype), meta(N, D, dtype=dtype), meta(N, dtype=dtype))
        name = "linear_contrast_stats" if stats else "linear_contrast_sqnorm"
        found.append(
            Case(
                f"{name} B={B} N={N} D={D} {DTYPES[dtype]} {loss}{' log' if log else ''}",
                lambda: (
                    linear_contrast.linear_contrast_stats(x, w, b, loss, False)
                    if stats
                    else linear_contrast.linear_contrast_sqnorm(x, w, b, loss, log, False)
                ),
                product=True,
                **kinds,
            )
        )

    for loss in losses:
        for B, N, D, dtype in (
            (1, 1000, 2048, half), (32, 1000, 2048, half), (64, 32000, 4096, half), (1024, 32000, 4096, half),
            (32, 1000, 2048, single), (1024, 1000, 2048, single),
        ):  # fmt: skip
            linear(B, N, D, dtype, loss, False, False)
        linear(32, 1000, 2048, half, loss, True, False)
        for B, N, D, dtype in (
            (8, 128256, 4096, half),
            (1024, 128256, 4096, half),
            (256, 32000, 4096, single),
        ):
            linear(B, N, D, dtype, loss, False, True)

    def targets(B: int, N: int, D: int, kind: str, loss: str, log: bool) -> None:
        y = meta(B, dtype=torch.int64) if kind == "indices" else meta(B, N) if kind == "soft" else None
        found.append(
            Case(
                f"target_sqnorm B={B} N={N} D={D} bf16 {kind} {loss}{' log' if log else ''}",
                lambda: target.target_sqnorm(
                    meta(B, D, dtype=half), meta(B, N, dtype=half), y, kind, loss, True, log, False
                ),
            )
        )

    for loss in losses:
        for kind in ("ones", "predicted", "soft"):
            targets(4096, 1000, 512, kind, loss, False)
    targets(256, 128256, 4096, "indices", "brier", True)

    def rows_linear(B: int, N: int, D: int, U: int, dtype: torch.dtype) -> None:
        found.append(
            Case(
                f"contrast_rows_linear B={B} N={N} D={D} U={U} {DTYPES[dtype]}",
                lambda: rows.contrast_rows_linear(
                    meta(B, D, dtype=dtype), meta(B, N), meta(U, N * D, dtype=dtype), meta(U, dtype=dtype)
                ),
                product=True,
            )
        )

    rows_linear(32, 1000, 2048, 128, half)
    rows_linear(1024, 1000, 2048, 300, half)
    rows_linear(1024, 10, 512, 300, single)
    rows_linear(4096, 10, 512, 300, half)
    rows_linear(1, 10, 512, 300, torch.float16)

    def conv(C: int, O: int, size: int, kernel: int, stride: int, dtype: torch.dtype) -> None:  # noqa: E741
        last = torch.channels_last
        a = meta(64, C, size, size, dtype=dtype).contiguous(memory_format=last)
        out = (size - 1) // stride + 1
        g = meta(64, O, out, out, dtype=dtype).contiguous(memory_format=last).unsqueeze(0)
        each = [(kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1)]
        found.append(
            Case(
                f"conv_sqnorm B=64 {C} to {O} {size}x{size} kernel {kernel} stride {stride} {DTYPES[dtype]}",
                lambda: layer_sqnorm.conv_sqnorm(a, g, *each, 1),
                product=True,
                wide=C % 16 == 0,
            )
        )

    for dtype in (half, torch.float16, single):
        conv(64, 64, 32, 3, 1, dtype)
        conv(256, 512, 8, 3, 2, dtype)
        conv(3, 64, 32, 3, 1, dtype)
        for T, C, O in ((196, 768, 3072), (1024, 256, 256)):  # noqa: E741
            found.append(
                Case(
                    f"linear_sqnorm B=64 T={T} C={C} O={O} {DTYPES[dtype]}",
                    lambda T=T, C=C, O=O, dtype=dtype: layer_sqnorm.linear_sqnorm(  # type: ignore[misc] # noqa: E741
                        meta(64, T, C, dtype=dtype), meta(1, 64, T, O, dtype=dtype)
                    ),
                    product=True,
                )
            )

    def moments(B: int, C: int, T: int, dtype: torch.dtype, last: bool, wide: bool = True) -> None:
        x = meta(B, T, C, dtype=dtype).transpose(1, 2) if last else meta(B, C, T, dtype=dtype)
        found.append(
            Case(
                f"channel_moments B={B} C={C} T={T} {DTYPES[dtype]} {'channels last' if last else 'contiguous'}",
                lambda: channel_moments.channel_moments(x),
                wide=wide,
            )
        )

    for dtype in (half, torch.float16, single):
        moments(1, 64, 12544, dtype, False)
        moments(32, 256, 784, dtype, False)
        moments(32, 2048, 49, dtype, False, wide=False)
        moments(1, 64, 12544, dtype, True)
        moments(32, 768, 197, dtype, True)
        moments(32, 2048, 49, dtype, True)
        moments(32, 3, 50176, dtype, True, wide=False)
        moments(4096, 512, 1, dtype, False)
    moments(1, 1, 1, single, False, wide=False)

    # Sizes of 1 are constants to the compiler, and take other branches of the language.
    one, ones, loss = meta(1, 1), meta(1), "mse"
    for name, call in (
        ("contrast_sqnorm", lambda: contrast.contrast_sqnorm(one, one, loss, True, True, True)),
        (
            "linear_contrast_sqnorm",
            lambda: linear_contrast.linear_contrast_sqnorm(one, one, ones, loss, True, True),
        ),
        ("linear_contrast_stats", lambda: linear_contrast.linear_contrast_stats(one, one, ones, loss, True)),
        ("target_sqnorm", lambda: target.target_sqnorm(one, one, one, "soft", loss, True, True, True)),
        ("contrast_rows_linear", lambda: rows.contrast_rows_linear(one, one, one, ones)),
    ):
        found.append(Case(f"{name} B=1 N=1 D=1 fp32 {loss}", call, product="linear" in name, wide=False))
    return found


@contextlib.contextmanager
def _catching(arch: str, caught: list[Launch]) -> Iterator[None]:
    """Collect launches instead of making them, as if the tensors were on a device of the given architecture."""
    jit = triton.runtime.jit.JITFunction
    saved = (jit.run, launch.architecture, launch.check)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        caught.append(_describe(kernel, args, kwargs))

    jit.run = run
    launch.architecture = lambda tensor: heuristics.KNOWN_ARCHITECTURES[arch]
    launch.check = lambda **tensors: None
    try:
        yield
    finally:
        jit.run, launch.architecture, launch.check = saved


def _describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Specialise arguments as Triton's launcher does: 1 is a constant, multiples of 16 and fresh pointers are known."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {}
    for name, value in kwargs.items():
        (values if name in kernel.arg_names else options)[name] = value
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or (value is None) or (isinstance(value, int) and value == 1 and not plain):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not plain:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return Launch(kernel, signature, constants, attributes, options)


def launches(case: Case, arch: str) -> list[Launch]:
    """The launches a case makes on an architecture."""
    caught: list[Launch] = []
    with _catching(arch, caught):
        case.call()
    return caught


def compile_launch(one: Launch, arch: str) -> Any:
    """Compile a caught launch for an architecture."""
    source = ASTSource(one.kernel, one.signature, constexprs=one.constants, attrs=one.attributes)
    return triton.compile(source, target=TARGETS[arch], options=one.options)


def _tool(name: str) -> str:
    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True
        )
        code = subprocess.run(
            [_tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True
        ).stdout
    numbers = {
        key: max(map(int, re.findall(rf"\b{key}:(\d+)", usage.stdout)), default=0)
        for key in ("REG", "STACK", "LOCAL")
    }
    return {
        "registers": numbers["REG"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "local": numbers["STACK"] + numbers["LOCAL"],
        # Asynchronous copies to shared memory are loads too.
        "wide_loads": len(
            re.findall(r"\b(?:LDG\.E\S*\.128|LDGSTS\S*\.128|UTMALDG|LDG\.E\S*\.ENL2\.256)", code)
        ),
        "wide_stores": len(re.findall(r"\b(?:STG\.E\S*\.128|UTMASTG|STG\.E\S*\.ENL2\.256)", code)),
        "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|UTCMMA|UTC\w*MMA)\b", code)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", code)),
    }


def _read_amdgcn(code: str) -> dict[str, int]:
    def number(key: str) -> int:
        return max(map(int, re.findall(rf"\.{key}:\s+(\d+)", code)), default=0)

    return {
        "registers": number("vgpr_count"),
        # Scalar registers spill into lanes of vector registers; memory is touched only by what "local" counts.
        "spills": number("vgpr_spill_count"),
        "local": number("private_segment_fixed_size"),
        "wide_loads": len(re.findall(r"\b(?:global|buffer|flat)_load_(?:dwordx4|b128)", code)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer|flat)_store_(?:dwordx4|b128)", code)),
        "matrix": len(re.findall(r"\bv_mfma", code)),
        "instructions": len(re.findall(r"^\t[a-z]\w+", code, re.MULTILINE)),
    }


def read(case: Case, one: Launch, arch: str) -> Row:
    """Compile one launch and read its machine code."""
    compiled = compile_launch(one, arch)
    numbers = (
        _read_amdgcn(compiled.asm["amdgcn"]) if arch.startswith("gfx") else _read_cubin(compiled.asm["cubin"])
    )
    return Row(
        case=case.name, kernel=one.kernel.__name__, arch=arch, warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared, expects_matrix=case.product, expects_wide=case.wide, **numbers,
    )  # fmt: skip


def faults(row: Row) -> list[str]:
    """What a row does not keep of the promises made for every kernel."""
    found = []
    if row.spills or row.local:
        found.append(f"{row.spills} spills, {row.local} bytes of local memory")
    limit = heuristics.KNOWN_ARCHITECTURES[row.arch].shared_memory
    if row.shared > limit:
        found.append(f"{row.shared} bytes of shared memory, {limit} there")
    if row.expects_matrix and not row.matrix:
        found.append("no matrix instruction")
    if row.expects_wide and not row.wide_loads:
        found.append("no 16-byte load")
    if row.expects_wide and not row.wide_stores and row.kernel in WIDE_STORES:
        found.append("no 16-byte store")
    return found


# Kernels that write whole rows; the others write one number per row or tile.
WIDE_STORES = {
    "contrast_rows_kernel", "contrast_stream_kernel", "contrast_finish_kernel", "linear_contrast_kernel",
}  # fmt: skip


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
            for one in launches(case, arch):
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
        "Made by `python -m bench.compile_report --out`; no GPU is needed. Registers are per thread. A fault is a "
        "spill, local memory, too much shared memory, a product without matrix instructions, or rows of whole 16 "
        "bytes read or written in smaller pieces.\n\n" + table(ordered) + "\n"
    )


if __name__ == "__main__":
    main()
