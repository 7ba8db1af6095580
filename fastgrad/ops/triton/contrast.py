"""Launcher of the all-contrast squared norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrad.kernels import contrast as kernels
from fastgrad.kernels.losses import PLANES
from fastgrad.ops import tune
from fastgrad.ops.triton import devices
from fastgrad.ops.tune import cdiv, share


def contrast_sqnorm(features: Tensor, logits: Tensor, loss: str, bias: bool, log: bool, mean: bool) -> Tensor:
    """Squared norms for every one-hot contrast, ``(B, N)`` float32, of features ``(B, D)`` and logits ``(B, N)``."""
    devices.check(features=features, logits=logits)
    (B, D), N = features.shape, logits.shape[1]
    out = devices.empty((B, N), torch.float32, logits)
    if B == 0 or N == 0:
        return out
    config = tune.contrast(B, N, D, loss, devices.architecture(logits))
    strides_h, align_h = devices.strides(features)
    strides_z, align_z = devices.strides(logits)
    align_n = devices.alignment(N)
    shape = (N // align_n, D, *strides_h, *strides_z)
    options: dict[str, Any] = {
        "LOSS": loss, "LOG": log, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d, "ALIGN_H": align_h,
        "ALIGN_Z": align_z, "ALIGN_N": align_n, "num_warps": config.num_warps, **devices.OPTIONS,
    }  # fmt: skip
    if config.kind == "rows":
        kernels.contrast_rows_kernel[(cdiv(B, config.rows),)](
            features, logits, out, B, *shape, BIAS=bias, MEAN=mean, ROWS=config.rows, **options
        )
    elif config.kind == "stream":
        kernels.contrast_stream_kernel[(B,)](features, logits, out, *shape, BIAS=bias, MEAN=mean, **options)
    else:
        chunk_n = share(N, config.splits, config.block_n)
        splits = cdiv(N, chunk_n)
        work = devices.empty((PLANES, B, splits), torch.float32, logits)
        kernels.contrast_moments_kernel[(B * splits,)](
            features, logits, work, *shape, splits, chunk_n, share(D, splits, 16), **options
        )
        finish(
            logits, work, out, splits, (splits, 1), splits, config.block_n,
            LOSS=loss, BIAS=bias, LOG=log, MEAN=mean, PARTS=tune.power_of_two(splits), num_warps=config.num_warps,
        )  # fmt: skip
    return out


def finish(
    logits: Tensor, work: Tensor, out: Tensor, parts: int, strides: tuple[int, int], chunks: int, block_n: int,
    **options: Any,
) -> None:  # fmt: skip
    """Launch ``contrast_finish_kernel``: from logits and partial moments to norms, all ``(B, N)``.

    ``work`` ``(PLANES, ...)`` holds ``parts`` parts a row, at ``strides`` from a row to the next and from a part to the
    next. Up to ``chunks`` programs share a row.
    """
    B, N = logits.shape
    strides_z, align_z = devices.strides(logits)
    align_n = devices.alignment(N)
    chunk_n = share(N, chunks, block_n)
    chunks = cdiv(N, chunk_n)
    kernels.contrast_finish_kernel[(B * chunks,)](
        logits, work, out, N // align_n, *strides_z, parts, *strides, work.stride(0), chunks, chunk_n,
        BLOCK_N=block_n, ALIGN_Z=align_z, ALIGN_N=align_n, **options, **devices.OPTIONS,
    )  # fmt: skip
