"""Bytes and operations of every launch, from its shape and its configuration.

``loaded`` and ``stored`` count each element as often as the kernel names it, wherever it then comes from; ``memory``
is the part that must cross the device's memory: every input once, every output once, and again what a later sweep no
longer finds in the cache. Formulas are for cross-entropy without logarithm; ``tests/bench`` compares them with what
the kernels do in the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastgrad.ops import heuristics
from fastgrad.ops.heuristics import Architecture, cdiv

#: Planes of partial moments that cross-entropy writes (two largest logits, two sums), and the statistics form.
PLANES, STATS_PLANES = 4, 5
#: Floating-point operations for each logit of moments and of values, and the exponentials among them, counted in
#: the interpreter (``counter``) and rounded up.
MOMENT_OPS, VALUE_OPS, EXPONENTIALS = 22, 14, 4


@dataclass(frozen=True)
class Work:
    """What one launch does.

    Attributes:
        kernel: Name of the device function.
        programs: Size of the grid.
        warps: Of a program.
        loaded: Bytes of loads.
        stored: Bytes of stores.
        memory: Bytes to and from device memory, at least.
        product: Operations of ``tl.dot``, padding included.
        useful: The same without padding.
        elementwise: Other floating-point operations.
        exponentials: Among them, those of the special function units.
        in_flight: Bytes of loads a program has under way at once.
    """

    kernel: str
    programs: int
    warps: int
    loaded: int
    stored: int
    memory: int
    product: int = 0
    useful: int = 0
    elementwise: int = 0
    exponentials: int = 0
    in_flight: int = 0


def contrast(
    B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture, cache: float = 50e6
) -> list[Work]:
    """Launches of ``contrast_sqnorm``."""
    config, e = heuristics.contrast(B, N, D, "cross_entropy", dtype, arch), dtype.itemsize
    logits, features, out = B * N * e, B * D * e, 4 * B * N
    ops = {"elementwise": B * N * (MOMENT_OPS + VALUE_OPS) + 2 * B * D, "exponentials": B * N * EXPONENTIALS}
    width = config.rows * config.block_n
    if config.kind == "rows":
        return [
            Work(
                "contrast_rows_kernel", cdiv(B, config.rows), config.num_warps, logits + features, out,
                logits + features + out, in_flight=config.rows * (min(N, config.block_n) + min(D, config.block_d)) * e,
                **ops,
            )
        ]  # fmt: skip
    if config.kind == "stream":
        again = 0 if 2 * arch.processors * N * e < cache / 2 else logits
        return [
            Work(
                "contrast_stream_kernel", B, config.num_warps, 2 * logits + features, out,
                logits + again + features + out, in_flight=width * e, **ops,
            )
        ]  # fmt: skip
    chunk = cdiv(cdiv(N, config.splits), config.block_n) * config.block_n
    splits = cdiv(N, chunk)
    partial = B * splits * 4 * (PLANES + 1)
    again = 0 if logits < cache / 2 else logits
    return [
        Work(
            "contrast_moments_kernel", B * splits, config.num_warps, logits + features, partial,
            logits + features + partial, elementwise=B * N * MOMENT_OPS + 2 * B * D,
            exponentials=B * N * EXPONENTIALS // 2,
            in_flight=width * e,
        ),
        Work(
            "contrast_finish_kernel", B * splits, config.num_warps, logits + partial * splits, out,
            again + out, elementwise=B * N * VALUE_OPS, exponentials=B * N * EXPONENTIALS // 2, in_flight=width * e,
        ),
    ]  # fmt: skip


def target(B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture, kind: str = "ones") -> list[Work]:
    """Launch of ``target_sqnorm``; ``kind`` is ``ones`` (three sweeps) or ``predicted`` (one)."""
    config, e = heuristics.target(B, N, D, dtype, arch), dtype.itemsize
    sweeps = 3 if kind == "ones" else 1
    return [
        Work(
            "target_sqnorm_kernel", cdiv(B, config.rows), config.num_warps, sweeps * B * N * e + B * D * e, 4 * B,
            B * N * e + B * D * e + 4 * B, elementwise=B * N * (MOMENT_OPS + 10 * (sweeps - 1)) + 2 * B * D,
            exponentials=B * N * sweeps, in_flight=config.rows * min(N, config.block_n) * e,
        )
    ]  # fmt: skip


def linear_contrast(
    B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture, cache: float = 50e6
) -> list[Work]:
    """Launches of ``linear_contrast_sqnorm`` with a bias."""
    config, e = heuristics.linear_contrast(B, N, D, dtype, arch), dtype.itemsize
    tiles_m, tiles_n = cdiv(B, config.block_m), cdiv(N, config.block_n)
    tiles, groups = tiles_m * tiles_n, cdiv(tiles_m, config.group_m)
    chunks = cdiv(N, cdiv(cdiv(N, max(config.chunks, 1)), config.block_f) * config.block_f)
    partial = tiles_n * B * 4 * (PLANES + 1)
    loaded = tiles * (config.block_m + config.block_n) * D * e + tiles_m * N * e
    if not config.norm_in_loop:
        loaded += B * D * e
    logits, out = B * N * e, 4 * B * N
    weight = N * D * e
    passes = 1 if weight < cache / 2 else groups
    own_launch = config.chunks > 0 and not config.queue
    at_once = logits if own_launch else min(config.group_m * config.block_m * N * e, logits)
    again = 0 if at_once < cache / 2 else logits
    product = Work(
        "linear_contrast_kernel",
        groups * config.group_m * (tiles_n + (chunks if config.queue else 0)), config.num_warps,
        loaded, logits + partial, passes * weight + B * D * e + N * e + logits,
        product=2 * tiles * config.block_m * config.block_n * cdiv(D, config.block_k) * config.block_k,
        useful=2 * B * N * D, elementwise=B * N * MOMENT_OPS, exponentials=B * N * EXPONENTIALS // 2,
        in_flight=max(1, config.num_stages - 1) * (config.block_m + config.block_n) * config.block_k * e,
    )  # fmt: skip
    finish = Work(
        "contrast_finish_kernel", B * chunks, config.num_warps, chunks * partial + logits, out, again + out,
        elementwise=B * N * VALUE_OPS, exponentials=B * N * EXPONENTIALS // 2, in_flight=config.block_f * e,
    )  # fmt: skip
    if own_launch:
        return [product, finish]
    added = ("loaded", "stored", "memory", "elementwise", "exponentials")
    return [replace(product, **{name: getattr(product, name) + getattr(finish, name) for name in added})]


def linear_stats(
    B: int, N: int, D: int, dtype: torch.dtype, arch: Architecture, cache: float = 50e6
) -> list[Work]:
    """Launch of ``linear_contrast_stats`` with a bias."""
    config, e = heuristics.linear_stats(B, N, D, dtype, arch), dtype.itemsize
    tiles_m, tiles_n = cdiv(B, config.block_m), cdiv(N, config.block_n)
    splits = cdiv(tiles_n, config.tiles_per_split)
    partial = splits * B * 4 * (STATS_PLANES + 1)
    tiles = tiles_m * tiles_n
    weight = N * D * e
    resident = cdiv(arch.processors, splits)
    passes = 1 if weight < cache / 2 else cdiv(tiles_m, max(1, resident))
    return [
        Work(
            "linear_stats_kernel", tiles_m * splits, config.num_warps,
            tiles * (config.block_m + config.block_n) * D * e + tiles_m * N * e + B * D * e + partial,
            partial + 20 * B, passes * weight + B * D * e + N * e + 20 * B,
            product=2 * tiles * config.block_m * config.block_n * cdiv(D, config.block_k) * config.block_k,
            useful=2 * B * N * D, elementwise=B * N * (MOMENT_OPS + 12), exponentials=B * N * EXPONENTIALS // 2,
            in_flight=max(1, config.num_stages - 1) * (config.block_m + config.block_n) * config.block_k * e,
        )
    ]  # fmt: skip
