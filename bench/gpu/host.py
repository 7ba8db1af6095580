"""Microseconds that a call spends in Python before its kernel starts, on a driver that compiles but launches nothing.

python -m bench.gpu.host

They bound small batches, unless a CUDA graph removes them. PyTorch's softmax of the same logits on the CPU is printed,
too.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

import fastgrad
from fastgrad.ops import dispatch, tune
from fastgrad.ops.triton import contrasts, devices


class Launcher:
    """Takes what a launch passes to the driver, and does nothing."""

    def __init__(self, *source: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None: ...


def driver() -> Any:
    """Return a driver of one sm_90 whose launches do nothing."""
    utils = SimpleNamespace(
        load_binary=lambda *code: (code, code, 32, 0, 1024), get_device_properties=lambda d: {"max_shared_mem": 232448}
    )
    return SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32), launcher_cls=Launcher, utils=utils,
    )  # fmt: skip


def best(call: Callable[[], object], number: int = 500) -> float:
    """Return the least microseconds of a call, on the clock of this process."""
    call()
    return min(timeit.repeat(call, timer=time.process_time, number=number, repeat=20)) / number * 1e6


def measure(B: int = 8, N: int = 1000, D: int = 512) -> dict[str, float]:
    """Return microseconds of the public call, of the launcher within it, of Triton within that, and of a softmax."""
    h, z = torch.randn(B, D), torch.randn(B, N)
    options = ("cross_entropy", True, False, False)
    triton.runtime.driver.set_active(driver())
    arch = tune.KNOWN_ARCHITECTURES["sm_90"]
    launch, captured = triton.runtime.jit.JITFunction.run, list[Any]()

    def capture(function: Any, *args: Any, **kwargs: Any) -> None:
        captured.append((function, args, kwargs))

    with (
        mock.patch.object(dispatch, "triton_refusal", lambda device, dtype: None),  # noqa: PT008 - a mock takes longer
        mock.patch.object(devices, "architecture", lambda tensor: arch),  # noqa: PT008
        torch.no_grad(),
    ):
        with mock.patch.object(triton.runtime.jit.JITFunction, "run", capture):
            contrasts.contrast_sqnorm(h, z, *options)
        function, args, kwargs = captured[0]
        return {
            "call": best(lambda: fastgrad.contrast_sqnorm(h, z, impl="triton")),
            "launcher": best(lambda: contrasts.contrast_sqnorm(h, z, *options)),
            "Triton": best(lambda: launch(function, *args, **kwargs)),
            "torch.softmax on this CPU": best(lambda: torch.softmax(z, -1)),
        }


def main() -> None:
    for name, microseconds in measure().items():
        print(f"{name}: {microseconds:.1f}")


if __name__ == "__main__":
    main()
