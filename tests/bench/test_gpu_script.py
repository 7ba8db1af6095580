"""bench/gpu/gpu.sh walks through every step without a GPU, so that it needs no edit on first contact."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = {
    "environment.txt", "tests.txt", "rows.json", "kernels.json", "tuned.txt", "sanitizer.txt", "summary.md",
}  # fmt: skip


def _script(*words: str, path: str = "", python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": python, "HOME": "/nonexistent", "PYTHONPATH": path}
    return subprocess.run(
        [bash, str(ROOT / "bench" / "gpu" / "gpu.sh"), *words], capture_output=True, text=True, env=environment,
        timeout=900, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_dry_run(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("triton")
    # PyTorch imports this where it is installed.
    (tmp_path / "pynvml.py").write_text("import warnings; warnings.warn('old', FutureWarning)")
    done = _script("--out", str(tmp_path / "out"), "--dry-run", path=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "FAILED" not in summary
    for step in ("test suite", "micro benchmarks", "repeats", "times and predictions", "measured choices"):
        assert f"| {step} | passed" in summary
    found = json.loads((tmp_path / "out" / "kernels.json").read_text())["rows"]
    report = json.loads((ROOT / "bench" / "results" / "compile.json").read_text())["rows"]
    assert {row["case"] for row in found} == {
        row["case"] for row in report if row["arch"] == "sm_90" and row["call_us"]
    }
    assert {row["verdict"] for row in found} == {"reached"}


@pytest.mark.parametrize("missing", ["pytest", "pytest_benchmark", "hypothesis"])
def test_a_missing_package_skips_its_steps(missing: str, tmp_path: pathlib.Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$*" != "-c import {missing}" ]\n')
    python.chmod(0o755)
    done = _script("--out", str(tmp_path / "out"), "--dry-run", python=str(python))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== test suite: skipped, pytest, pytest-benchmark or hypothesis is not installed" in done.stdout
    assert ("== micro benchmarks: skipped" in done.stdout) == (missing == "pytest_benchmark")


def test_without_a_folder() -> None:
    done = _script("--dry-run")
    assert done.returncode == 2
    assert "--out DIR" in done.stderr
