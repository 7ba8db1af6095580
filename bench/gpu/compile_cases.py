"""The cases that are compiled: one call of a launcher for every shape that `tune` treats differently."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import gcd
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastgrad.checks import KERNEL_DTYPES
from fastgrad.losses import LOSSES
from fastgrad.ops import tune
from fastgrad.ops.triton import contrasts, devices, layer_sqnorm
from fastgrad.ops.tune import Architecture

HALF, SINGLE = torch.bfloat16, torch.float32
#: Makes a tensor of a shape, given ``dtype`` and ``seed``.
Make = Callable[..., Tensor]
Call = Callable[[], Any]


class Case(NamedTuple):
    """One call of a launcher.

    Attributes:
        name: Name in the tables.
        inputs: Its tensors, which no kernel may write.
        call: Runs the launcher on them.
        quick: Whether every test run compiles it, as the case of its kernel and path, and a device times it.
        wide: Whether rows are multiples of 16 bytes, which must then be loaded and stored 16 bytes at a time.
        products: Multiplications on the matrix units, without which no kernel runs.
    """

    name: str
    inputs: Sequence[Tensor]
    call: Call
    quick: bool = False
    wide: bool = True
    products: int = 0


def meta(*shape: int, dtype: torch.dtype = SINGLE, seed: int = 0) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def as_if_on(architecture: Architecture) -> Any:
    """Let launchers take meta tensors as tensors on a device of this architecture."""
    return mock.patch.object(devices, "architecture", return_value=architecture)


def configured(**configs: object) -> Any:
    """Let functions of `tune`, by name, return these configurations; a context manager, and a decorator of calls.

    A function as a configuration takes the place of the other.
    """
    replaced = {
        name: config if callable(config) else mock.Mock(return_value=config) for name, config in configs.items()
    }
    return mock.patch.dict(vars(tune), replaced)


def prepared(
    launcher: Any, make: Make, B: int, N: int, D: int, loss: str, *, kind: str = "", bias: bool = True,
    log: bool = False, mean: bool = False,
) -> partial[Any]:  # fmt: skip
    """Return the call of a launcher of the last layer; ``kind`` is the target's."""
    h, z = make(B, D), make(B, N, seed=1)
    if launcher is contrasts.contrast_stats:
        return partial(launcher, h, z, loss, bias, mean)
    y = (torch.arange(len(h)) % z.shape[1]).to(z.device) if kind == "indices" else None
    return partial(launcher, h, z, *((y, kind) if kind else ()), loss, bias, log, mean)


def tensors(call: partial[Any]) -> list[Tensor]:
    return [value for value in call.args if isinstance(value, Tensor)]


def _case(
    launcher: Any, make: Make, B: int, N: int, D: int, dtype: torch.dtype, loss: str, quick: bool = False,
    **options: Any,
) -> Case:  # fmt: skip
    call = prepared(launcher, partial(make, dtype=dtype), B, N, D, loss, **options)
    words = (KERNEL_DTYPES[dtype], options.get("kind"), loss, "log" if options.get("log") else "")
    name = " ".join((launcher.__name__, f"B={B} N={N} D={D}", *filter(None, words)))
    # Tiles of longer rows begin at multiples of 16 bytes, wherever the row does.
    wide = tune.longest_row(loss) < N or gcd(N, D) * dtype.itemsize % 16 == 0
    return Case(name, tensors(call), call, quick, wide)


def cases(make: Make = meta) -> Iterator[Case]:
    """Yield the shapes that `tune` treats differently, for every kernel."""
    norms = partial(_case, contrasts.contrast_sqnorm, make)
    for loss in LOSSES:
        yield norms(4096, 1000, 512, HALF, loss, quick=loss == "cross_entropy")
        yield norms(4096, 1000, 512, HALF, loss, log=True)
        yield norms(4096, 8192 if loss == "brier" else 16384, 4096, SINGLE, loss)
        yield norms(4096, 262144, 4096, HALF, loss, quick=loss == "cross_entropy")
        yield norms(8, 131072, 4096, HALF, loss, log=True, quick=loss == "brier")
        # Rows that are no multiple of 16 bytes.
        yield norms(16, 50257, 768, HALF, loss)
        yield norms(4096, 50257, 768, HALF, loss, log=True)
        # Few rows, which have more threads.
        yield norms(256, 1000, 512, SINGLE, loss)
    yield norms(4096, 1000, 512, SINGLE, "cross_entropy")
    for N, dtype in itertools.product((10, 16, 128, 4096, 8192), (SINGLE, HALF)):
        yield norms(4096, N, 512, dtype, "cross_entropy")
    for B in (1, 265, 4096):
        yield norms(B, 128256, 4096, HALF, "cross_entropy")
    # One sample, few and many with D above N, which one program must not load step by step.
    for B, D in ((1, 4096), (32, 2048), (4096, 4096)):
        yield norms(B, 10, D, SINGLE, "cross_entropy", quick=B > 1)
    statistics = partial(_case, contrasts.contrast_stats, make)
    for loss in LOSSES:
        yield statistics(8, 128256, 4096, HALF, loss)
        yield statistics(128, 1000, 2048, HALF, loss, quick=loss == "cross_entropy")
        yield statistics(512, 128256, 4096, HALF, loss, quick=loss == "bce")
        yield statistics(256, 32000, 4096, SINGLE, loss)
    one = partial(_case, contrasts.target_sqnorm, make)
    for loss in LOSSES:
        for kind in ("ones", "predicted"):
            yield one(4096, 1000, 512, HALF, loss, kind=kind, quick=kind == "ones")
    yield one(4096, 1000, 512, HALF, "bce", kind="ones", log=True, quick=True)
    yield one(256, 128256, 4096, HALF, "brier", log=True, kind="indices", quick=True)
    for loss in LOSSES:
        yield one(256, 128256, 4096, HALF, loss, kind="uniform")
    yield from _layers(make)
    # The compiler takes sizes of 1 for constants.
    ones = (1, 1, 1, SINGLE, "mse")
    yield norms(*ones, log=True, mean=True)
    yield statistics(*ones, mean=True)
    yield one(*ones, kind="uniform", log=True, mean=True)


def _layers(make: Make) -> Iterator[Case]:
    for dtype, word in KERNEL_DTYPES.items():
        for C, O, size, k, stride in ((64, 64, 32, 3, 1), (256, 512, 8, 3, 2), (3, 64, 32, 3, 1)):  # noqa: E741
            out = (size - 1) // stride + 1
            a, g = make(64, C, size, size, dtype=dtype), make(1, 64, O, out, out, dtype=dtype)
            call = partial(layer_sqnorm.conv_sqnorm, a, g, (k, k), (stride,) * 2, (k // 2,) * 2, (1, 1), 1)
            name = f"conv_sqnorm B=64 {C} to {O} {size}x{size} kernel {k} stride {stride} {word}"
            quick = stride == 2 and dtype == HALF
            yield Case(name, (a, g), call, quick, wide=C % 16 == 0, products=C * k**2 * g.numel())
        for T, C, O in ((196, 768, 3072), (1024, 256, 256)):  # noqa: E741
            a, g = make(64, T, C, dtype=dtype), make(1, 64, T, O, dtype=dtype)
            name = f"linear_sqnorm B=64 T={T} C={C} O={O} {word}"
            call = partial(layer_sqnorm.linear_sqnorm, a, g)
            yield Case(name, (a, g), call, quick=T == 196 and dtype == HALF, products=C * g.numel())
