"""Launchers of the fused last layer: logits with all contrast norms, or statistics over the contrasts alone."""

from __future__ import annotations

import torch

from fastgrad.kernels import linear_contrast as kernels
from fastgrad.kernels.losses import PLANES
from fastgrad.ops import tune
from fastgrad.ops.triton import devices
from fastgrad.ops.triton.contrast import finish


def _check(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    devices.check(features=features, weight=weight)
    if bias is not None:
        devices.check(bias=bias)
    if weight.dtype != features.dtype:
        raise ValueError(
            f"weight must have the dtype of features, {features.dtype}, for impl='triton'; it was {weight.dtype}"
        )


def _slice(D: int, parts: int, step: int) -> int:
    """Features whose squares each of ``parts`` programs adds up: whole steps, so that vector loads stay aligned."""
    return tune.cdiv(tune.cdiv(D, max(parts, 1)), step) * step


def linear_contrast_sqnorm(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, loss: str, log: bool, mean: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a linear layer and the squared norms of its gradients for every one-hot contrast.

    The norms are those of the logits as returned, after rounding to their dtype: the result equals
    ``contrast_sqnorm(features, logits)`` up to the order of sums. Features are ``(B, D)``, the weight ``(N, D)`` and
    the logits ``(B, N)`` of one dtype, the norms ``(B, N)`` float32.
    """
    _check(features, weight, bias)
    (B, D), N = features.shape, weight.shape[0]
    logits = devices.empty((B, N), features.dtype, features)
    out = devices.empty((B, N), torch.float32, features)
    if B == 0 or N == 0:
        return logits, out
    config = tune.linear_contrast(B, N, D, features.dtype, devices.architecture(features))
    tiles_m, tiles_n = tune.cdiv(B, config.block_m), tune.cdiv(N, config.block_n)
    groups = tune.cdiv(tiles_m, config.group_m)
    stride_xb, align_x = devices.rows_alignment(features)
    stride_wn, align_w = devices.rows_alignment(weight)
    align_n = devices.alignment(N)
    with devices.device_guard(features):
        work = devices.empty((PLANES, tiles_n, B), torch.float32, features)
        sync = work if config.chunks else torch.zeros(tiles_m, dtype=torch.int32, device=features.device)
        kernels.linear_contrast_kernel[(groups * config.group_m * tiles_n,)](
            features, weight, bias.contiguous() if bias is not None else weight, logits, out, work, sync,
            B, N // align_n, D, stride_xb, features.stride(1), stride_wn, weight.stride(1),
            _slice(D, tiles_n, config.block_k),
            LOSS=loss, LOG=log, MEAN=mean, HAS_BIAS=bias is not None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
            BLOCK_F=config.block_f, PARTS=config.parts, LAST=config.chunks == 0,
            NORM_IN_LOOP=config.norm_in_loop, EVEN_K=D % config.block_k == 0, PRECISION=config.precision,
            UPCAST=devices.upcast(features), ALIGN_X=align_x, ALIGN_W=align_w, ALIGN_N=align_n,
            num_warps=config.num_warps, num_stages=config.num_stages, **devices.OPTIONS,
        )  # fmt: skip
        if config.chunks:
            finish(
                logits, work, out, tiles_n, (1, B), config.chunks, config.block_f,
                LOSS=loss, BIAS=bias is not None, LOG=log, MEAN=mean, PARTS=config.parts, num_warps=config.num_warps,
            )  # fmt: skip
    return logits, out


def linear_contrast_stats(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, loss: str, mean: bool
) -> torch.Tensor:
    """Statistics of the contrast norms of a linear layer whose logits are never written.

    ``(B, 5)`` float32: minimum, maximum, mean, expectation under ``softmax(logits)``, predicted class. Brier takes a
    second launch that repeats the product.
    """
    _check(features, weight, bias)
    (B, D), N = features.shape, weight.shape[0]
    out = devices.empty((B, 5), torch.float32, features)
    if B == 0:
        return out
    config = tune.linear_stats(B, N, D, features.dtype, devices.architecture(features), loss)
    tiles_m, tiles_n = tune.cdiv(B, config.block_m), tune.cdiv(N, config.block_n)
    splits = tune.cdiv(tiles_n, config.tiles_per_split)
    stride_xb, align_x = devices.rows_alignment(features)
    stride_wn, align_w = devices.rows_alignment(weight)
    passes = (0, PLANES) if loss == "brier" else (0,)
    with devices.device_guard(features):
        work = devices.empty((PLANES + 2, splits, B), torch.float32, features)
        sync = torch.zeros(len(passes), tiles_m, dtype=torch.int32, device=features.device)
        for i, extremes in enumerate(passes):
            kernels.linear_stats_kernel[(tiles_m * splits,)](
                features, weight, bias.contiguous() if bias is not None else weight, out, work, sync[i],
                B, N, D, stride_xb, features.stride(1), stride_wn, weight.stride(1),
                splits, config.tiles_per_split, _slice(D, splits, config.block_k),
                LOSS=loss, MEAN=mean, HAS_BIAS=bias is not None, EXTREMES=extremes,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, PARTS=config.parts,
                EVEN_K=D % config.block_k == 0, PRECISION=config.precision, UPCAST=devices.upcast(features),
                ALIGN_X=align_x, ALIGN_W=align_w, num_warps=config.num_warps, num_stages=config.num_stages,
                **devices.OPTIONS,
            )  # fmt: skip
    return out
