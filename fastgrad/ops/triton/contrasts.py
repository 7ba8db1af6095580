"""Launchers of the last layer's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fastgrad.kernels import contrast, linear_stats
from fastgrad.kernels.losses import PLANES
from fastgrad.kernels.target import target_sqnorm_kernel
from fastgrad.ops import tune
from fastgrad.ops.triton import devices
from fastgrad.ops.tune import cdiv, chunk


@lru_cache(1024)
def _contrast_plan(
    choose: Callable[..., tuple[tune.Options, int]], shape: tuple[int, int, int], strides: tuple[int, int, int, int],
    loss: str, bias: bool, log: bool, mean: bool, arch: tune.Architecture,
) -> tuple[str, int, int, int, tuple[int, ...], tune.Options, tune.Options]:  # fmt: skip
    """Return path, programs, splits, logits of a split, the integers that all kernels take, and two kernels' constants.

    ``choose`` is `tune.contrast`; ``strides`` are of rows and columns of the features, then of the logits.
    """
    B, N, D = shape
    config, splits = choose(B, N, D, loss, arch)
    align_h, align_z, align_n = map(devices.alignment, (strides[0], strides[2], N))
    integers = (N // align_n, D, strides[0] // align_h, strides[1], strides[2] // align_z, strides[3])
    options: tune.Options = {
        "LOSS": loss, "LOG": log, "ALIGN_Z": align_z, "ALIGN_N": align_n, **config, **devices.OPTIONS
    }  # fmt: skip
    ends: tune.Options = {**options, "BIAS": bias, "MEAN": mean}
    options["ALIGN_H"] = align_h
    if "ROWS" in config:
        return "rows", cdiv(B, config["ROWS"]), 1, N, integers, options | ends, {}
    if splits == 1:
        return "stream", B, 1, N, integers, options | ends, {}
    chunk_n = chunk(N, splits, config["BLOCK_N"])
    splits = cdiv(N, chunk_n)
    ends["PARTS"] = tune.power_of_two(splits)
    del ends["BLOCK_D"]
    return "split", B * splits, splits, chunk_n, integers, options, ends


def contrast_sqnorm(features: Tensor, logits: Tensor, loss: str, bias: bool, log: bool, mean: bool) -> Tensor:
    """Return squared norms of all one-hot contrasts, ``(B, N)`` float32, for features ``(B, D)``, logits ``(B, N)``."""
    B, N = logits.shape
    out = devices.empty((B, N), torch.float32, logits)
    if B == 0 or N == 0:
        return out
    D = features.shape[1]
    path, programs, splits, chunk_n, integers, options, ends = _contrast_plan(
        tune.contrast, (B, N, D), (*features.stride(), *logits.stride()), loss, bias, log, mean,
        devices.architecture(logits),
    )  # fmt: skip
    if path == "rows":
        contrast.contrast_rows_kernel[(programs,)](features, logits, out, B, *integers, **options)
    elif path == "stream":
        contrast.contrast_stream_kernel[(programs,)](features, logits, out, *integers, **options)
    else:
        work = devices.empty((PLANES, B, splits), torch.float32, logits)
        contrast.contrast_moments_kernel[(programs,)](
            features, logits, work, *integers, splits, chunk_n, chunk(D, splits, 16), **options
        )
        contrast.contrast_finish_kernel[(programs,)](
            logits, work, out, integers[0], *integers[4:], splits, chunk_n, **ends
        )
    return out


def target_sqnorm(
    features: Tensor, logits: Tensor, target: Tensor | None, kind: str, loss: str, bias: bool, log: bool, mean: bool
) -> Tensor:
    """Return squared norms of one target per sample, ``(B,)`` float32, for features ``(B, D)`` and logits ``(B, N)``.

    ``target`` is ``(B,)`` int64 for ``indices``, else None. An index outside ``[0, N)`` gives NaN: reading it back to
    raise would wait for the device.
    """
    (B, D), N = features.shape, logits.shape[1]
    out = devices.empty((B,), torch.float32, logits)
    if B == 0:
        return out
    if kind == "uniform" and N == 1:
        kind = "ones"  # the same label, whose logarithm does not underflow
    config = tune.target(B, N, D, devices.architecture(logits))
    strides_h, align_h = devices.strides(features)
    strides_z, align_z = devices.strides(logits)
    align_n = devices.alignment(N)
    target_sqnorm_kernel[(cdiv(B, config["ROWS"]),)](
        features, logits, logits if target is None else target, out, B, N // align_n, D, *strides_h, *strides_z,
        0 if target is None else target.stride(0), LOSS=loss, KIND=kind, BIAS=bias, LOG=log, MEAN=mean,
        ALIGN_H=align_h, ALIGN_Z=align_z, ALIGN_N=align_n, **config, **devices.OPTIONS,
    )  # fmt: skip
    return out


def linear_contrast_stats(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, mean: bool) -> Tensor:
    """Return statistics ``(B, 5)`` float32 of the contrast norms of a linear layer, whose logits are never written.

    They are minimum, maximum, mean, softmax expectation and predicted class; not for brier.
    """
    (B, D), N = features.shape, weight.shape[0]
    out = devices.empty((B, 5), torch.float32, features)
    if B == 0:
        return out
    config, tiles = tune.linear_stats(B, N, D, features.dtype, devices.architecture(features), loss)
    tiles_m, splits = cdiv(B, config["BLOCK_M"]), cdiv(cdiv(N, config["BLOCK_N"]), tiles)
    strides_x, align_x = devices.strides(features)
    strides_w, align_w = devices.strides(weight)
    work = devices.empty((PLANES, B, splits), torch.float32, features)
    linear_stats.linear_stats_kernel[(tiles_m * splits,)](
        features, weight, weight if bias is None else bias.contiguous(), work, B, N, D, *strides_x, *strides_w,
        splits, tiles, chunk(D, splits, config["BLOCK_K"]), LOSS=loss, HAS_BIAS=bias is not None,
        EVEN_K=D % config["BLOCK_K"] == 0, UPCAST=devices.upcast(features), ALIGN_X=align_x, ALIGN_W=align_w,
        **config, **devices.OPTIONS,
    )  # fmt: skip
    linear_stats.stats_finish_kernel[(B,)](
        work, out, N, splits, LOSS=loss, BIAS=bias is not None, MEAN=mean, PARTS=tune.power_of_two(splits),
        num_warps=4, **devices.OPTIONS,
    )  # fmt: skip
    return out
