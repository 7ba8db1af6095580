"""Every kernel compiles for GPUs that are not here, and keeps its promises in the machine code."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest
from python_process import run_python

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parent.parent
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1100")


#: Triton compiles in these processes instead of interpreting.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def report(*arguments: str) -> list[dict[str, Any]]:
    """Rows of ``bench.gpu.compile_report``."""
    printed = run_python("-m", "bench.gpu.compile_report", "--json", *arguments, cwd=ROOT, env=ENVIRONMENT)
    rows: list[dict[str, Any]] = json.loads(printed)["rows"]
    return rows


def complaints(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows do not keep: spills, local memory, narrow accesses, products without matrix instructions."""
    return [f"{row['arch']} {row['case']} {row['kernel']}: {row['faults']}" for row in rows if row["faults"]]


def test_one_case_of_every_kernel() -> None:
    architectures = ("sm_90", "gfx942")
    rows = report("--quick", *(word for arch in architectures for word in ("--arch", arch)))
    assert complaints(rows) == []
    kernels = {"contrast_rows_kernel", "rows_kernel", "moments_kernel", "finish_kernel"}
    for arch in architectures:
        assert {row["kernel"] for row in rows if row["arch"] == arch} >= kernels, arch


def test_one_exponential_a_logit_and_one_instruction_for_it() -> None:
    """A row of 1,000 logits has 32 in each thread of a warp; the margin takes one exponential more."""
    architectures = ("sm_80", "sm_90", "sm_100")
    only = ("--only", "^contrast_sqnorm B=4096 N=1000 D=512 .* cross_entropy$")
    rows = report(*only, *(word for arch in architectures for word in ("--arch", arch)))
    assert sorted(row["arch"] for row in rows) == sorted(2 * architectures)
    for row in rows:
        assert row["exponentials"] == 33
        assert row["roundings"] == row["barriers"] == 0
        assert row["per_row"] <= 1100


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_case(arch: str) -> None:
    rows = report("--arch", arch)
    assert {row["arch"] for row in rows} == {arch}
    assert complaints(rows) == []
