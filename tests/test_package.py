"""What importing the package costs, and what it must not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastgrad

_BLOCKED = """
import sys
blocked = {'triton', 'matplotlib', 'sklearn', 'scipy', 'ray', 'litserve', 'fastapi', 'tqdm', 'torchvision'}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in blocked:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_and_eager_work_without_triton() -> None:
    out = run(
        _BLOCKED
        + "import torch, fastgrad\n"
        + "print(tuple(fastgrad.contrast_sqnorm(torch.randn(2, 3), torch.randn(2, 5)).shape))"
    )
    assert out.strip() == "(2, 5)"


def test_import_is_light() -> None:
    loaded = run(
        "import sys, torch; before = set(sys.modules); import fastgrad; print(*(set(sys.modules) - before))"
    )
    roots = {name.split(".")[0] for name in loaded.split()}
    assert not roots & {"triton", "sklearn", "matplotlib", "tqdm", "ray", "scipy", "fastapi", "litserve"}
    assert "fastgrad.functional" in loaded


def test_public_names_exist() -> None:
    for name in fastgrad.__all__:
        assert callable(getattr(fastgrad, name)), name
    assert set(fastgrad.__all__) <= set(dir(fastgrad))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastgrad.nothing


def test_kernels_refuse_a_foreign_import_name() -> None:
    folder = Path(fastgrad.__file__).parent / "kernels"
    code = f"import runpy; runpy.run_path({str(folder / '__init__.py')!r}, run_name='kernels')"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode != 0
    assert "imported as 'fastgrad.kernels'" in failed.stderr
