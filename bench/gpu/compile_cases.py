"""What is compiled: one call of a launcher for every shape that `tune` treats differently.

To add a kernel, add its calls to ``cases()`` and the most telling one to ``QUICK``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch

from fastgrad.checks import KERNEL_DTYPES
from fastgrad.losses import LOSSES
from fastgrad.ops import tune
from fastgrad.ops.triton import contrast, devices, layer_sqnorm, linear_contrast, target
from fastgrad.ops.tune import Architecture

HALF, SINGLE = torch.bfloat16, torch.float32
#: One case for each kernel: what every test run compiles.
QUICK = (
    "contrast_sqnorm B=4096 N=1000 D=512 bf16 cross_entropy",
    "contrast_sqnorm B=4096 N=262144 D=4096 bf16 cross_entropy",
    "contrast_sqnorm B=8 N=131072 D=4096 bf16 brier log",
    "linear_contrast_sqnorm B=1024 N=32000 D=4096 bf16 brier",
    "linear_contrast_stats B=1024 N=128256 D=4096 bf16 bce",
    "target_sqnorm B=4096 N=1000 D=512 bf16 soft brier",
    "conv_sqnorm B=64 256 to 512 8x8 kernel 3 stride 2 bf16",
    "linear_sqnorm B=64 T=196 C=768 O=3072 bf16",
)


class Case(NamedTuple):
    """One call of a launcher.

    Attributes:
        name: What the table says; starts with the operator's name.
        call: Runs the launcher on meta tensors.
        wide: Whether 16-byte loads and stores must appear; they need rows of a multiple of 16 bytes.
    """

    name: str
    call: Callable[[], object]
    wide: bool = True


def meta(*shape: int, dtype: torch.dtype = SINGLE) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@contextlib.contextmanager
def as_if_on(architecture: Architecture) -> Iterator[None]:
    """Let launchers take meta tensors, as tensors on a device of this kind."""
    with mock.patch.multiple(devices, architecture=lambda tensor: architecture, check=lambda **tensors: None):
        yield


@contextlib.contextmanager
def configured(**configs: object) -> Iterator[None]:
    """Let launchers run as these say, by name of the function of `tune` that would choose."""
    with contextlib.ExitStack() as stack:
        for name, config in configs.items():
            stack.enter_context(mock.patch.object(tune, name, return_value=config))
        yield


def cases() -> list[Case]:
    """Return the shapes that `tune` treats differently, for every kernel."""
    return [*_contrasts(), *_heads(), *_targets(), *_layers(), *_ones()]


def _case(
    launcher: Callable[..., object], B: int, N: int, D: int, dtype: torch.dtype, loss: str, log: bool = False, *,
    kind: str = "", wide: bool = True,
) -> Case:  # fmt: skip
    words = (launcher.__name__, f"B={B} N={N} D={D}", KERNEL_DTYPES[dtype], kind, loss, "log" if log else "")
    h, z, w, b = (meta(*shape, dtype=dtype) for shape in ((B, D), (B, N), (N, D), (N,)))
    y = {"indices": meta(B, dtype=torch.int64), "soft": meta(B, N)}.get(kind)
    arguments = {
        contrast.contrast_sqnorm: (h, z, loss, True, log, False),
        linear_contrast.linear_contrast_sqnorm: (h, w, b, loss, log, False),
        linear_contrast.linear_contrast_stats: (h, w, b, loss, False),
        target.target_sqnorm: (h, z, y, kind, loss, True, log, False),
    }[launcher]
    return Case(" ".join(filter(None, words)), functools.partial(launcher, *arguments), wide)


def _contrasts() -> Iterator[Case]:
    case = functools.partial(_case, contrast.contrast_sqnorm)
    for loss in LOSSES:
        yield case(4096, 1000, 512, HALF, loss)
        yield case(4096, 1000, 512, HALF, loss, True)
        yield case(4096, 8192 if loss == "brier" else 16384, 4096, SINGLE, loss)
        yield case(4096, 262144, 4096, HALF, loss)
        yield case(8, 131072, 4096, HALF, loss, True)
    for N, dtype in ((16, SINGLE), (128, HALF), (1000, SINGLE), (4096, HALF), (8192, SINGLE)):
        yield case(4096, N, 512, dtype, "cross_entropy")
    yield case(4096, 10, 512, SINGLE, "cross_entropy", wide=False)


def _heads() -> Iterator[Case]:
    case = functools.partial(_case, linear_contrast.linear_contrast_sqnorm)
    statistics = functools.partial(_case, linear_contrast.linear_contrast_stats)
    for loss in LOSSES:
        for B, N, D in ((1, 1000, 2048), (32, 1000, 2048), (64, 32000, 4096), (1024, 32000, 4096)):
            yield case(B, N, D, HALF, loss)
        yield case(32, 1000, 2048, SINGLE, loss)
        yield case(1024, 1000, 2048, SINGLE, loss)
        yield case(32, 1000, 2048, HALF, loss, True)
        yield statistics(8, 128256, 4096, HALF, loss)
        yield statistics(1024, 128256, 4096, HALF, loss)
        yield statistics(256, 32000, 4096, SINGLE, loss)


def _targets() -> Iterator[Case]:
    case = functools.partial(_case, target.target_sqnorm)
    for loss in LOSSES:
        for kind in ("ones", "predicted", "soft"):
            yield case(4096, 1000, 512, HALF, loss, kind=kind)
    yield case(256, 128256, 4096, HALF, "brier", True, kind="indices")


def _layers() -> Iterator[Case]:
    for dtype in (HALF, torch.float16, SINGLE):
        for C, O, size, kernel, stride in ((64, 64, 32, 3, 1), (256, 512, 8, 3, 2), (3, 64, 32, 3, 1)):  # noqa: E741
            out = (size - 1) // stride + 1
            a, g = meta(64, C, size, size, dtype=dtype), meta(1, 64, O, out, out, dtype=dtype)
            each = ((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1), 1)
            shape = f"{C} to {O} {size}x{size} kernel {kernel} stride {stride}"
            call = functools.partial(layer_sqnorm.conv_sqnorm, a, g, *each)
            yield Case(f"conv_sqnorm B=64 {shape} {KERNEL_DTYPES[dtype]}", call, wide=C % 16 == 0)
        for T, C, O in ((196, 768, 3072), (1024, 256, 256)):  # noqa: E741
            a, g = meta(64, T, C, dtype=dtype), meta(1, 64, T, O, dtype=dtype)
            call = functools.partial(layer_sqnorm.linear_sqnorm, a, g)
            yield Case(f"linear_sqnorm B=64 T={T} C={C} O={O} {KERNEL_DTYPES[dtype]}", call)


def _ones() -> Iterator[Case]:
    """Sizes of 1 are constants to the compiler, and take other branches of the language."""
    one, ones = meta(1, 1), meta(1)
    for function, arguments in (
        (contrast.contrast_sqnorm, (one, one, "mse", True, True, True)),
        (linear_contrast.linear_contrast_sqnorm, (one, one, ones, "mse", True, True)),
        (linear_contrast.linear_contrast_stats, (one, one, ones, "mse", True)),
        (target.target_sqnorm, (one, one, one, "soft", "mse", True, True, True)),
    ):
        name = f"{function.__name__} B=1 N=1 D=1 fp32 mse"
        yield Case(name, functools.partial(function, *arguments), wide=False)
