"""What importing the package costs, and what it must not need."""

from __future__ import annotations

import locale
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgrad

ROOT = Path(__file__).parents[1]

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
    loaded = run("import sys, torch; before = set(sys.modules); import fastgrad; print(*(set(sys.modules) - before))")
    roots = {name.split(".")[0] for name in loaded.split()}
    assert not roots & {"triton", "sklearn", "matplotlib", "tqdm", "ray", "scipy", "fastapi", "litserve"}
    assert "fastgrad.gradients.contrasts" in loaded


def test_public_names_exist() -> None:
    for name in fastgrad.__all__:
        assert callable(getattr(fastgrad, name)), name
        assert getattr(fastgrad, name).__doc__, name
    assert set(fastgrad.__all__) <= set(dir(fastgrad))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastgrad.nothing


def in_checkout(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)


@pytest.mark.parametrize("code", ["from kernels import contrast", "import kernels; kernels.contrast"])
def test_kernels_refuse_a_foreign_import_name(code: str) -> None:
    failed = in_checkout(code)
    assert failed.returncode != 0
    assert "ImportError: the kernels of fastgrad are imported as 'fastgrad.kernels'" in failed.stderr


def test_a_checkout_hides_no_other_project() -> None:
    # How transformers looks for the project that owns the name.
    probe = "import kernels as k; assert getattr(k, '__version__', None) is getattr(k, '__file__', None) is None"
    assert in_checkout(probe).returncode == 0
    assert in_checkout("import kernels.contrast").returncode != 0


def test_another_encoding_is_named_before_any_test_runs(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has cp1252 where Python has no other word."""
    monkeypatch.setattr(locale, "getpreferredencoding", lambda *_: "cp1252")
    plugin = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    with pytest.raises(pytest.UsageError, match="set PYTHONUTF8=1; the encoding was cp1252"):
        plugin.pytest_configure(pytestconfig)


def test_workflows_name_files_that_exist() -> None:
    """pytest ends at once where one of its paths is not there."""
    files = [*ROOT.glob(".github/workflows/*.yml"), ROOT / ".ci" / "run", ROOT / "CONTRIBUTING.md"]
    named = {path for file in files for path in re.findall(r"\b(?:tests|bench|docs)/[\w./-]*\w", file.read_text())}
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
