"""Launchers of the fused last layer: logits with all contrast norms, or statistics over the contrasts alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.kernels import linear_contrast as kernels
from fastgrad.kernels.losses import PLANES
from fastgrad.ops import tune
from fastgrad.ops.triton import devices
from fastgrad.ops.triton.contrast import finish
from fastgrad.ops.tune import LinearConfig, cdiv, share


def linear_contrast_sqnorm(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, log: bool, mean: bool
) -> tuple[Tensor, Tensor]:
    """Logits of a linear layer and the squared norms of its gradients for every one-hot contrast.

    Features are ``(B, D)``, the weight ``(N, D)`` and the logits ``(B, N)`` of one dtype, the norms ``(B, N)`` float32:
    those of the logits as returned, after rounding to their dtype.
    """
    _check(features, weight, bias)
    (B, D), N = features.shape, weight.shape[0]
    logits = devices.empty((B, N), features.dtype, features)
    out = devices.empty((B, N), torch.float32, features)
    if B == 0 or N == 0:
        return logits, out
    config = tune.linear_contrast(B, N, D, features.dtype, devices.architecture(features))
    tensors, strides, options = _operands(features, weight, bias, config)
    tiles_m, tiles_n = cdiv(B, config.block_m), cdiv(N, config.block_n)
    align_n = devices.alignment(N)
    work = devices.empty((PLANES, tiles_n, B), torch.float32, features)
    sync = work if config.chunks else torch.zeros(tiles_m, dtype=torch.int32, device=features.device)
    kernels.linear_contrast_kernel[(cdiv(tiles_m, config.group_m) * config.group_m * tiles_n,)](
        *tensors, logits, out, work, sync, B, N // align_n, D, *strides, share(D, tiles_n, config.block_k),
        LOSS=loss, LOG=log, MEAN=mean, GROUP_M=config.group_m, BLOCK_F=config.block_f, LAST=config.chunks == 0,
        NORM_IN_LOOP=config.norm_in_loop, ALIGN_N=align_n, **options,
    )  # fmt: skip
    if config.chunks:
        finish(
            logits, work, out, tiles_n, (1, B), config.chunks, config.block_f,
            LOSS=loss, BIAS=bias is not None, LOG=log, MEAN=mean, PARTS=config.parts, num_warps=config.num_warps,
        )  # fmt: skip
    return logits, out


def linear_contrast_stats(features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, mean: bool) -> Tensor:
    """Statistics ``(B, 5)`` float32 of the contrast norms of a linear layer whose logits are never written.

    They are minimum, maximum, mean, softmax expectation and predicted class. Brier takes a second launch.
    """
    _check(features, weight, bias)
    (B, D), N = features.shape, weight.shape[0]
    out = devices.empty((B, 5), torch.float32, features)
    if B == 0:
        return out
    config = tune.linear_stats(B, N, D, features.dtype, devices.architecture(features), loss)
    tensors, strides, options = _operands(features, weight, bias, config)
    tiles_m, splits = cdiv(B, config.block_m), cdiv(cdiv(N, config.block_n), config.tiles_per_split)
    passes = (0, PLANES) if loss == "brier" else (0,)
    work = devices.empty((PLANES + 2, splits, B), torch.float32, features)
    sync = torch.zeros(len(passes), tiles_m, dtype=torch.int32, device=features.device)
    for arrivals, extremes in zip(sync, passes, strict=True):
        kernels.linear_stats_kernel[(tiles_m * splits,)](
            *tensors, out, work, arrivals, B, N, D, *strides,
            splits, config.tiles_per_split, share(D, splits, config.block_k),
            LOSS=loss, MEAN=mean, EXTREMES=extremes, **options,
        )  # fmt: skip
    return out


def _check(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    devices.check(features=features, weight=weight)
    if bias is not None:
        devices.check(bias=bias)
    if weight.dtype != features.dtype:
        raise ValueError(
            f"weight must have the dtype of features, {features.dtype}, for impl='triton'; it was {weight.dtype}"
        )


def _operands(
    features: Tensor, weight: Tensor, bias: Tensor | None, config: LinearConfig
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """What both kernels take: tensors, strides, constants."""
    strides_x, align_x = devices.strides(features)
    strides_w, align_w = devices.strides(weight)
    options = {
        "HAS_BIAS": bias is not None, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PARTS": config.parts, "EVEN_K": features.shape[1] % config.block_k == 0, "PRECISION": config.precision,
        "UPCAST": devices.upcast(features), "ALIGN_X": align_x, "ALIGN_W": align_w,
        "num_warps": config.num_warps, "num_stages": config.num_stages, **devices.OPTIONS,
    }  # fmt: skip
    return (features, weight, weight if bias is None else bias.contiguous()), (*strides_x, *strides_w), options
