"""What importing the package costs, and what it must not need."""

from __future__ import annotations

import locale
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from python_process import run_python

import fastgrad

ROOT = Path(__file__).parents[1]


def test_import_is_light() -> None:
    loaded = run_python("-c", "import sys, torch; old = {*sys.modules}; import fastgrad; print(*{*sys.modules} - old)")
    roots = {name.split(".")[0] for name in loaded.split()}
    assert not roots & {"triton", "sklearn", "matplotlib", "tqdm", "ray", "scipy", "fastapi", "litserve"}
    assert "fastgrad.gradients.contrasts" in loaded


def test_norms_need_no_part_of_scikit_learn() -> None:
    code = """
import sys, torch, fastgrad
model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
with fastgrad.record(model):
    losses = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 0, 1]), reduction="none")
    fastgrad.grad_sqnorm(losses, model)
fastgrad.contrast_sqnorm(x, model(x).detach())
print(*{name.partition(".")[0] for name in sys.modules})
"""
    assert not {"sklearn", "scipy", "matplotlib"} & set(run_python("-c", code).split())


def test_public_names_exist() -> None:
    for name in fastgrad.__all__:
        assert callable(getattr(fastgrad, name)), name
        assert getattr(fastgrad, name).__doc__, name
    assert set(fastgrad.__all__) <= set(dir(fastgrad))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastgrad.nothing


#: What happens to the name of the folder of kernels in a checkout, where another project may own it.
FOREIGN = {
    "from kernels import contrast": "ImportError: the kernels of fastgrad are imported as 'fastgrad.kernels'",
    "import kernels; kernels.contrast": "ImportError: the kernels of fastgrad are imported as 'fastgrad.kernels'",
    "import kernels.contrast": "Error",
    # How transformers looks for the project that owns the name.
    "import kernels as k; assert getattr(k, '__version__', None) is getattr(k, '__file__', None) is None": "",
}


@pytest.mark.parametrize("code", FOREIGN)
def test_a_checkout_hides_no_other_project(code: str) -> None:
    """Without site-packages, where the project that owns the name may be installed."""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert bool(done.returncode) == bool(FOREIGN[code])
    assert FOREIGN[code] in done.stderr


def test_a_checkout_hands_its_folders_name_to_the_project_that_owns_it(tmp_path: Path) -> None:
    owner, another = tmp_path / "site" / "kernels", tmp_path / "checkout"
    owner.mkdir(parents=True)
    (owner / "__init__.py").write_text("__version__ = '1.0'\ndef get_kernel(): return 'theirs'\n")
    (owner / "layer.py").write_text("from . import get_kernel\nfound = get_kernel()\n")
    # Two checkouts before it must not look for each other.
    shutil.copytree(ROOT / "kernels", another / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        f"import sys; sys.path[1:1] = [{str(another)!r}, {str(owner.parent)!r}]\n"
        "import kernels, kernels.layer\n"
        "from kernels import get_kernel\n"
        "print(kernels.__version__, get_kernel(), kernels.layer.found)"
    )
    assert run_python("-c", code, cwd=ROOT).split() == ["1.0", "theirs", "theirs"]


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
