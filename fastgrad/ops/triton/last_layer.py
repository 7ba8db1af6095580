"""Launchers of the last layer's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.kernels import contrast, linear_contrast
from fastgrad.kernels.losses import PLANES
from fastgrad.kernels.target import target_sqnorm_kernel
from fastgrad.ops import tune
from fastgrad.ops.triton import devices
from fastgrad.ops.tune import cdiv, share

#: Kinds of labels.
KINDS = ("ones", "uniform", "predicted", "indices", "soft")


def contrast_sqnorm(features: Tensor, logits: Tensor, loss: str, bias: bool, log: bool, mean: bool) -> Tensor:
    """Return squared norms of all one-hot contrasts, ``(B, N)`` float32, for features ``(B, D)``, logits ``(B, N)``."""
    (B, D), N = features.shape, logits.shape[1]
    out = devices.empty((B, N), torch.float32, logits)
    if B == 0 or N == 0:
        return out
    config, splits = tune.contrast(B, N, D, loss, devices.architecture(logits))
    strides_h, align_h = devices.strides(features)
    strides_z, align_z = devices.strides(logits)
    align_n = devices.alignment(N)
    shape = (N // align_n, D, *strides_h, *strides_z)
    options: tune.Options = {
        "LOSS": loss, "LOG": log, "ALIGN_H": align_h, "ALIGN_Z": align_z, "ALIGN_N": align_n, **config,
        **devices.OPTIONS,
    }  # fmt: skip
    if "ROWS" in config:
        contrast.contrast_rows_kernel[(cdiv(B, config["ROWS"]),)](
            features, logits, out, B, *shape, BIAS=bias, MEAN=mean, **options
        )
    elif splits == 1:
        contrast.contrast_stream_kernel[(B,)](features, logits, out, *shape, BIAS=bias, MEAN=mean, **options)
    else:
        chunk_n = share(N, splits, config["BLOCK_N"])
        splits = cdiv(N, chunk_n)
        work = devices.empty((PLANES, B, splits), torch.float32, logits)
        contrast.contrast_moments_kernel[(B * splits,)](
            features, logits, work, *shape, splits, chunk_n, share(D, splits, 16), **options
        )
        finish(
            logits, work, out, splits, (splits, 1), splits, config["BLOCK_N"],
            LOSS=loss, BIAS=bias, LOG=log, MEAN=mean, PARTS=tune.power_of_two(splits), num_warps=config["num_warps"],
        )  # fmt: skip
    return out


def finish(
    logits: Tensor, work: Tensor, out: Tensor, parts: int, strides: tuple[int, int], chunks: int, block_n: int,
    **options: Any,
) -> None:  # fmt: skip
    """Launch ``contrast_finish_kernel``, which turns logits ``(B, N)`` and partial moments into norms ``(B, N)``.

    ``work`` ``(PLANES, ...)`` holds ``parts`` parts per row; ``strides`` lead from a row to the next and from a part to
    the next. Up to ``chunks`` programs share a row.
    """
    B, N = logits.shape
    strides_z, align_z = devices.strides(logits)
    align_n = devices.alignment(N)
    chunk_n = share(N, chunks, block_n)
    chunks = cdiv(N, chunk_n)
    contrast.contrast_finish_kernel[(B * chunks,)](
        logits, work, out, N // align_n, *strides_z, parts, *strides, work.stride(0), chunks, chunk_n,
        BLOCK_N=block_n, ALIGN_Z=align_z, ALIGN_N=align_n, **options, **devices.OPTIONS,
    )  # fmt: skip


def target_sqnorm(
    features: Tensor, logits: Tensor, target: Tensor | None, kind: str, loss: str, bias: bool, log: bool, mean: bool
) -> Tensor:
    """Return squared norms of one target per sample, ``(B,)`` float32, for features ``(B, D)`` and logits ``(B, N)``.

    ``target`` is ``(B,)`` int64 for ``indices``, ``(B, N)`` of a floating dtype for ``soft``, else None. An index
    outside ``[0, N)`` gives NaN: reading it back to raise would wait for the device.
    """
    (B, D), N = features.shape, logits.shape[1]
    out = devices.empty((B,), torch.float32, logits)
    if B == 0:
        return out
    y = logits if target is None else target
    if kind == "uniform" and N == 1:
        kind = "ones"  # the same label, whose logarithm does not underflow
    config = tune.target(B, N, D, devices.architecture(logits))
    strides_h, align_h = devices.strides(features)
    strides_z, align_z = devices.strides(logits)
    strides_y, align_y = devices.strides(y)
    align_n = devices.alignment(N)
    target_sqnorm_kernel[(cdiv(B, config["ROWS"]),)](
        features, logits, y, out, B, N // align_n, D, *strides_h, *strides_z, *strides_y,
        LOSS=loss, KIND=kind, BIAS=bias, LOG=log, MEAN=mean,
        ALIGN_H=align_h, ALIGN_Z=align_z, ALIGN_Y=align_y, ALIGN_N=align_n, **config, **devices.OPTIONS,
    )  # fmt: skip
    return out


def linear_contrast_sqnorm(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, log: bool, mean: bool
) -> tuple[Tensor, Tensor]:
    """Return logits of a linear layer and the squared norms of its gradients for every one-hot contrast.

    Features are ``(B, D)``, the weight ``(N, D)`` and the logits ``(B, N)`` of one dtype, the norms ``(B, N)`` float32:
    those of the logits as returned, after rounding to their dtype.
    """
    (B, D), N = features.shape, weight.shape[0]
    logits = devices.empty((B, N), features.dtype, features)
    out = devices.empty((B, N), torch.float32, features)
    if B == 0 or N == 0:
        return logits, out
    config, chunks = tune.linear_contrast(B, N, D, features.dtype, devices.architecture(features))
    tensors, strides, options = _operands(features, weight, bias, config)
    tiles_m, tiles_n, group = cdiv(B, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"]), config["GROUP_M"]
    align_n = devices.alignment(N)
    work = devices.empty((PLANES, tiles_n, B), torch.float32, features)
    sync = work if chunks else torch.zeros(tiles_m, dtype=torch.int32, device=features.device)
    linear_contrast.linear_contrast_kernel[(cdiv(tiles_m, group) * group * tiles_n,)](
        *tensors, logits, out, work, sync, B, N // align_n, D, *strides, share(D, tiles_n, config["BLOCK_K"]),
        LOSS=loss, LOG=log, MEAN=mean, LAST=chunks == 0, ALIGN_N=align_n, **options,
    )  # fmt: skip
    if chunks:
        finish(
            logits, work, out, tiles_n, (1, B), chunks, config["BLOCK_F"], LOSS=loss, BIAS=bias is not None, LOG=log,
            MEAN=mean, PARTS=config["PARTS"], num_warps=config["num_warps"],
        )  # fmt: skip
    return logits, out


def linear_contrast_stats(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, mean: bool) -> Tensor:
    """Return statistics ``(B, 5)`` float32 of the contrast norms of a linear layer, whose logits are never written.

    They are minimum, maximum, mean, softmax expectation and predicted class. Brier takes a second launch.
    """
    (B, D), N = features.shape, weight.shape[0]
    out = devices.empty((B, 5), torch.float32, features)
    if B == 0:
        return out
    config, per_split = tune.linear_stats(B, N, D, features.dtype, devices.architecture(features), loss)
    tensors, strides, options = _operands(features, weight, bias, config)
    tiles_m, splits = cdiv(B, config["BLOCK_M"]), cdiv(cdiv(N, config["BLOCK_N"]), per_split)
    passes = (0, PLANES) if loss == "brier" else (0,)
    work = devices.empty((PLANES + 2, splits, B), torch.float32, features)
    sync = torch.zeros(len(passes), tiles_m, dtype=torch.int32, device=features.device)
    for arrivals, extremes in zip(sync, passes, strict=True):
        linear_contrast.linear_stats_kernel[(tiles_m * splits,)](
            *tensors, out, work, arrivals, B, N, D, *strides,
            splits, per_split, share(D, splits, config["BLOCK_K"]),
            LOSS=loss, MEAN=mean, EXTREMES=extremes, **options,
        )  # fmt: skip
    return out


def _operands(
    features: Tensor, weight: Tensor, bias: Tensor | None, config: tune.Options
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tune.Options]:
    """Return what both kernels take: tensors, strides, constants."""
    strides_x, align_x = devices.strides(features)
    strides_w, align_w = devices.strides(weight)
    options = {
        "HAS_BIAS": bias is not None, "EVEN_K": features.shape[1] % config["BLOCK_K"] == 0,
        "UPCAST": devices.upcast(features), "ALIGN_X": align_x, "ALIGN_W": align_w, **config, **devices.OPTIONS,
    }  # fmt: skip
    return (features, weight, weight if bias is None else bias.contiguous()), (*strides_x, *strides_w), options
