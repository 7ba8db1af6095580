"""Which implementation runs: Triton on a GPU, plain torch elsewhere, or what the caller insists on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TypeVar

import torch

_T = TypeVar("_T")

IMPLEMENTATIONS = ("auto", "triton", "eager")


def _installed(package: str) -> bool:
    """Whether a package can be found, without importing it; a broken or blocked one cannot."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


TRITON_INSTALLED = _installed("triton")


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, which serves tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot serve a tensor of this device and dtype, or None if it can."""
    if dtype == torch.float64:
        return "the kernels compute in float32, and the dtype was float64"
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    if device.type == "cpu":
        return "the device was cpu, where kernels only run with TRITON_INTERPRET=1"
    return f"the device was {device.type}, and kernels run on cuda (NVIDIA and AMD)"


def choose(impl: str, tensor: torch.Tensor) -> str:
    """Resolve ``impl`` to ``"triton"`` or ``"eager"`` for ``tensor``.

    ``"auto"`` takes Triton on a GPU where it can serve the dtype, and plain torch otherwise, also in the interpreter,
    which is for tests. An explicit choice is never replaced by another.

    Raises:
        ValueError: ``impl`` is unknown, or is ``"triton"`` where Triton cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}; it was {impl!r}")
    if impl == "eager" or (impl == "auto" and tensor.device.type != "cuda"):
        return "eager"
    refusal = triton_refusal(tensor.device, tensor.dtype)
    if impl == "triton":
        if refusal is not None:
            raise ValueError(f"impl must be 'auto' or 'eager' here: it was 'triton', but {refusal}")
        return "triton"
    return "triton" if refusal is None else "eager"


@contextlib.contextmanager
def bind_contextvar(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Give ``variable`` a value inside."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
