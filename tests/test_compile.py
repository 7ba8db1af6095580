"""Every kernel compiles for GPUs that are not here, and keeps its promises in the machine code."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def report(*arguments: str) -> list[dict[str, object]]:
    """Rows of ``bench.gpu.compile_report``, run in a process where Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.compile_report", "--json", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[dict[str, object]] = json.loads(done.stdout)["rows"]
    return rows


def complaints(rows: list[dict[str, object]]) -> list[str]:
    """What the rows do not keep: spills, local memory, narrow accesses, products without matrix instructions."""
    return [f"{row['arch']} {row['case']} {row['kernel']}: {row['faults']}" for row in rows if row["faults"]]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_one_case_of_every_kernel(arch: str) -> None:
    rows = report("--quick", "--arch", arch)
    assert complaints(rows) == []
    kernels = {
        "contrast_rows_kernel", "contrast_stream_kernel", "contrast_moments_kernel", "contrast_finish_kernel",
        "linear_contrast_kernel", "linear_stats_kernel", "target_sqnorm_kernel",
    }  # fmt: skip
    assert {row["kernel"] for row in rows if row["arch"] == arch} >= kernels


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_case(arch: str) -> None:
    rows = report("--arch", arch)
    assert {row["arch"] for row in rows} == {arch}
    assert complaints(rows) == []
