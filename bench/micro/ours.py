"""The forms in which an operator of fastgrad takes part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.harness.case import Implementation


def forms(
    call: Callable[[str], Any], check: Callable[[Any], float], tolerance: float, device: str
) -> list[Implementation]:
    """On a GPU the kernels, and the eager form; ``call`` takes the operator's ``impl``."""
    names = {"triton": "fastgrad Triton", "eager": "fastgrad eager"}
    return [
        Implementation(name, lambda impl=impl: lambda: call(impl), check, tolerance)  # type: ignore[misc]
        for impl, name in names.items()
        if impl == "eager" or device == "cuda"
    ]
