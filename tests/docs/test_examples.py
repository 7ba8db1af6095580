"""Every example runs from an empty folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from python_process import run_python

EXAMPLES = Path(__file__).parents[2] / "examples"
#: What each prints, and what it needs.
EXPECTED = {
    "trainer": ("step 2: largest norm", ("transformers", "accelerate")),
    "private_training": ("epsilon 8.0, accuracy", ("opacus",)),
    "client": ('"uncertainty"', ("fastapi",)),
    "score_folder": ("uncertainty", ("pyarrow",)),
    "benchmark_detector": ("fastgrad, clean only", ()),
}


def test_every_example_is_named() -> None:
    runnable = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert runnable == set(EXPECTED)
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}.py`" in listed for name in runnable)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    printed, needed = EXPECTED[name]
    for package in needed:
        pytest.importorskip(package)
    if name in ("client", "score_folder") and shutil.which("g++") is None:
        pytest.skip("compiling a model needs a C++ compiler")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    assert printed in run_python(EXAMPLES / f"{name}.py", cwd=tmp_path, env=environment)
