"""What tests of ONNX files need, and what they may be warned of."""

from __future__ import annotations

import importlib.util

import pytest

from fastgrad.deploy.file.onnx_export import TRANSLATES

#: Of onnxscript and what it imports.
WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def skip_without_onnx() -> None:
    """Skip a test, or the rest of a module, where no ONNX file can be written or run."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        # Importing them takes seconds, in each process that only collects the tests, too.
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}", allow_module_level=True)
    if not TRANSLATES:
        pytest.skip("ONNX files need PyTorch 2.9", allow_module_level=True)
