"""Shared by all tests: where the kernels run, and seeds.

With a GPU the kernels run on it; without one they run in Triton's interpreter, which must be chosen before the first
kernel is decorated.
"""

from __future__ import annotations

import collections
import importlib.metadata
import importlib.util
import locale
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples in every run, so that no submission depends on a draw; slow tests take new seeds.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

#: Processes for the whole suite, at most: one more than cores, as tests of servers wait.
PROCESSES = 4
if "PYTEST_XDIST_WORKER" in os.environ:
    # A core for each of them, or less.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in several processes; named tests, which start sooner so, in this one."""
    # A process of these runs the whole suite's hooks as well, and must start none of its own.
    whole = config.args_source is config.ArgsSource.TESTPATHS and "PYTEST_XDIST_WORKER" not in os.environ
    options = config.option
    # pytest-cov must know of processes before this.
    whole = whole and not getattr(options, "cov_source", None)
    if whole and getattr(options, "numprocesses", 0) is None and not (options.usepdb or options.collectonly):
        options.numprocesses = min(PROCESSES, 1 + (os.cpu_count() or 1))
        options.dist, options.loadscopereorder = "loadfile", False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give one process the tests of a file, or of the folder whose tests share a server, which takes long to start."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, folder = super()._split_scope(nodeid), "tests/deploy/serve/"
            return folder if file.startswith(folder) else file

    return Scheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    if (encoding := locale.getpreferredencoding(False)).lower() not in ("utf-8", "utf8"):
        raise pytest.UsageError(f"the pages that tests read are UTF-8: set PYTHONUTF8=1; the encoding was {encoding}")
    # numpy, on which the interpreter runs, warns where a device computes a NaN or an infinity.
    for message in ("invalid value", "divide by zero", "overflow", "underflow", "All-NaN"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:RuntimeWarning")
    # Triton's interpreter up to 3.6 does this; from numpy 2.4 on it is an error, so it needs an older numpy.
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        release = importlib.metadata.version("triton")
        if np.lib.NumpyVersion(release) < "3.7.0" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            raise pytest.UsageError(
                f"the interpreter of Triton {release} needs numpy below 2.4; it was {np.__version__}"
            )
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Of files that take turns at the processes, long ones begin, or one of them would go on alone at the end.
        count = collections.Counter(item.path for item in items)
        items.sort(key=lambda item: ("deploy" not in item.path.parts, -count[item.path]))
    without_gpu = pytest.mark.skip(reason="needs a GPU")
    slow = pytest.mark.skip(reason="slow; run with -m slow")
    for item in items:
        # Keywords hold the names of folders as well, of the checkout's among them.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)
        if item.get_closest_marker("slow") and not config.option.markexpr:
            item.add_marker(slow)


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """Where kernel tests run: the GPU, or the CPU under Triton's interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from bench.gpu.sanitize.watchers import patching_once

    with patching_once():
        yield torch.device("cpu")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the launchers allocate with NaN, so that an element no kernel wrote shows."""
    from fastgrad.ops.triton import devices

    plain = devices.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out: torch.Tensor = plain(*args, **kwargs)  # type: ignore[arg-type]
        return out.fill_(float("nan")) if out.dtype.is_floating_point else out

    monkeypatch.setattr(devices, "empty", poisoned)


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that the processes of one run of the suite share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "exports"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_package(exports: pathlib.Path) -> pathlib.Path:
    """A small exported model, compiled once."""
    from deploy_models import export_tiny

    from fastgrad._torch import require_cpp_compiler

    try:
        require_cpp_compiler("the test's model")
    except RuntimeError as error:
        pytest.skip(str(error))
    return export_tiny(exports, "tiny.pt2")


@pytest.fixture(scope="session")
def tiny_onnx(exports: pathlib.Path) -> pathlib.Path:
    """The same model as an ONNX file."""
    from deploy_models import export_tiny
    from onnx_needed import skip_without_onnx

    skip_without_onnx()
    return export_tiny(exports, "tiny.onnx")


@pytest.fixture(scope="module", params=["tiny_package", "tiny_onnx"], ids=["pt2", "onnx"])
def model_file(request: pytest.FixtureRequest) -> pathlib.Path:
    """That model as a file of each kind, one after the other: what holds for one must hold for all."""
    file: pathlib.Path = request.getfixturevalue(request.param)
    return file
