"""Bytes and operations of every launch, from its shape and its configuration: what a GPU run is held against.

``loaded`` and ``stored`` count each element as often as the kernel names it, wherever it then comes from; ``memory``
is the part that must cross the device's memory: every input once, every output once, and again what a later sweep no
longer finds in the cache. Formulas are for cross-entropy without logarithm; ``tests/bench`` compares them with what
the kernels do in the interpreter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.gpu.compile_cases import DTYPES
from fastgrad.ops import tune
from fastgrad.ops.tune import Architecture, cdiv

#: Planes of partial moments that cross-entropy writes (two largest logits, two sums), and the statistics form.
PLANES, STATS_PLANES = 4, 5
#: Bytes of second-level cache assumed: those of an H100.
CACHE = 50e6

#: The cases of a GPU run, named as in the compile report.
CASES = (
    "contrast_sqnorm B=4096 N=1000 D=512 bf16 cross_entropy",
    "contrast_sqnorm B=4096 N=16384 D=4096 fp32 cross_entropy",
    "contrast_sqnorm B=4096 N=32000 D=4096 bf16 cross_entropy",
    "contrast_sqnorm B=4096 N=262144 D=4096 bf16 cross_entropy",
    "contrast_sqnorm B=8 N=131072 D=4096 bf16 cross_entropy",
    "target_sqnorm B=4096 N=1000 D=512 bf16 ones cross_entropy",
    "linear_contrast_sqnorm B=1 N=1000 D=2048 bf16 cross_entropy",
    "linear_contrast_sqnorm B=32 N=1000 D=2048 bf16 cross_entropy",
    "linear_contrast_sqnorm B=64 N=32000 D=4096 bf16 cross_entropy",
    "linear_contrast_sqnorm B=1024 N=32000 D=4096 bf16 cross_entropy",
    "linear_contrast_sqnorm B=1024 N=1000 D=2048 fp32 cross_entropy",
    "linear_contrast_stats B=8 N=128256 D=4096 bf16 cross_entropy",
    "linear_contrast_stats B=1024 N=128256 D=4096 bf16 cross_entropy",
)


@dataclass(frozen=True)
class Work:
    """What one launch does.

    Attributes:
        kernel: Name of the device function.
        loaded: Bytes of loads.
        stored: Bytes of stores.
        memory: Bytes to and from device memory, at least.
        product: Operations of ``tl.dot``, padding included.
        useful: The same without padding.
    """

    kernel: str
    loaded: int
    stored: int
    memory: int
    product: int = 0
    useful: int = 0


def parse(case: str) -> tuple[str, dict[str, int], torch.dtype]:
    """Operator, sizes by letter and dtype of a case's name."""
    sizes = {letter: int(number) for letter, number in re.findall(r"\b([BND])=(\d+)", case)}
    return case.split()[0], sizes, next(dtype for dtype, word in DTYPES.items() if word in case.split())


def launches(case: str, arch: Architecture) -> list[Work]:
    """The launches of a case on an architecture."""
    operator, sizes, dtype = parse(case)
    made: dict[str, Callable[..., list[Work]]] = {
        "contrast_sqnorm": contrast,
        "target_sqnorm": target,
        "linear_contrast_sqnorm": linear_contrast,
        "linear_contrast_stats": linear_stats,
    }
    return made[operator](sizes["B"], sizes["N"], sizes["D"], dtype, arch)


def contrast(B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture) -> list[Work]:
    """Launches of ``contrast_sqnorm``."""
    config, e = tune.contrast(B, N, D, "cross_entropy", dtype, arch), dtype.itemsize
    logits, features, out = B * N * e, B * D * e, 4 * B * N
    once = logits + features + out
    if config.kind == "rows":
        return [Work("contrast_rows_kernel", logits + features, out, once)]
    if config.kind == "stream":
        again = 0 if 2 * arch.processors * N * e < CACHE / 2 else logits
        return [Work("contrast_stream_kernel", 2 * logits + features, out, once + again)]
    splits = cdiv(N, cdiv(cdiv(N, config.splits), config.block_n) * config.block_n)
    partial = B * splits * 4 * (PLANES + 1)
    again = 0 if logits < CACHE / 2 else logits
    return [
        Work("contrast_moments_kernel", logits + features, partial, logits + features + partial),
        Work("contrast_finish_kernel", logits + partial * splits, out, again + out),
    ]


def target(B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture, kind: str = "ones") -> list[Work]:
    """Launch of ``target_sqnorm``; ``kind`` is ``ones`` (three sweeps) or ``predicted`` (one)."""
    e = dtype.itemsize
    sweeps = 3 if kind == "ones" else 1
    loaded = sweeps * B * N * e + B * D * e
    return [Work("target_sqnorm_kernel", loaded, 4 * B, B * N * e + B * D * e + 4 * B)]


def linear_contrast(B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture) -> list[Work]:
    """Launches of ``linear_contrast_sqnorm`` with a bias."""
    config, e = tune.linear_contrast(B, N, D, dtype, arch), dtype.itemsize
    tiles_m, tiles_n = cdiv(B, config.block_m), cdiv(N, config.block_n)
    tiles, groups = tiles_m * tiles_n, cdiv(tiles_m, config.group_m)
    chunks = cdiv(N, cdiv(cdiv(N, max(config.chunks, 1)), config.block_f) * config.block_f)
    partial = tiles_n * B * 4 * (PLANES + 1)
    loaded = tiles * (config.block_m + config.block_n) * D * e + tiles_m * N * e
    if not config.norm_in_loop:
        loaded += B * D * e
    logits, out, weight = B * N * e, 4 * B * N, N * D * e
    passes = 1 if weight < CACHE / 2 else groups
    at_once = logits if config.chunks else min(config.group_m * config.block_m * N * e, logits)
    again = 0 if at_once < CACHE / 2 else logits
    product = Work(
        "linear_contrast_kernel", loaded, logits + partial, passes * weight + B * D * e + N * e + logits,
        product=2 * tiles * config.block_m * config.block_n * cdiv(D, config.block_k) * config.block_k,
        useful=2 * B * N * D,
    )  # fmt: skip
    finish = Work("contrast_finish_kernel", chunks * partial + logits, out, again + out)
    if config.chunks:
        return [product, finish]
    added = ("loaded", "stored", "memory")
    return [replace(product, **{name: getattr(product, name) + getattr(finish, name) for name in added})]


def linear_stats(B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture) -> list[Work]:
    """Launch of ``linear_contrast_stats`` with a bias."""
    config, e = tune.linear_stats(B, N, D, dtype, arch), dtype.itemsize
    tiles_m, tiles_n = cdiv(B, config.block_m), cdiv(N, config.block_n)
    splits, tiles = cdiv(tiles_n, config.tiles_per_split), tiles_m * tiles_n
    partial = splits * B * 4 * (STATS_PLANES + 1)
    weight = N * D * e
    passes = 1 if weight < CACHE / 2 else cdiv(tiles_m, max(1, cdiv(arch.processors, splits)))
    return [
        Work(
            "linear_stats_kernel",
            tiles * (config.block_m + config.block_n) * D * e + tiles_m * N * e + B * D * e + partial,
            partial + 20 * B, passes * weight + B * D * e + N * e + 20 * B,
            product=2 * tiles * config.block_m * config.block_n * cdiv(D, config.block_k) * config.block_k,
            useful=2 * B * N * D,
        )
    ]  # fmt: skip
