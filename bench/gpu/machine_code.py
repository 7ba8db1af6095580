"""Registers, spills, memory, wide loads and stores, and matrix instructions, read from machine code."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import triton


def read(assembly: Mapping[str, Any]) -> dict[str, int]:
    """Of a kernel as Triton compiled it, for either maker."""
    return _amdgcn(assembly["amdgcn"]) if "amdgcn" in assembly else _cubin(assembly["cubin"])


def _tool(name: str) -> str:
    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _cubin(cubin: bytes) -> dict[str, int]:
    # The tools ship with Triton.
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


def _amdgcn(code: str) -> dict[str, int]:
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
