"""Launcher of the all-contrast squared norms."""

from __future__ import annotations

from typing import Any

import torch

from fastgrad.kernels import contrast as kernels

from .. import heuristics
from . import launch


def contrast_sqnorm(
    features: torch.Tensor, logits: torch.Tensor, loss: str, bias: bool, log: bool, mean: bool
) -> torch.Tensor:
    """Squared norms of the last layer's gradients for every one-hot contrast.

    Args:
        features: ``(B, D)``, input of the last layer; any strides.
        logits: ``(B, N)``; any strides.
        loss: One of ``fastgrad.losses.LOSSES``.
        bias: Whether the layer's bias gradient belongs to the norm.
        log: Return logarithms, computed in log space.
        mean: Whether the loss averages over classes instead of summing.

    Returns:
        ``(B, N)`` float32.
    """
    launch.check(features=features, logits=logits)
    (B, D), N = features.shape, logits.shape[1]
    out = launch.empty((B, N), torch.float32, logits)
    if B == 0 or N == 0:
        return out
    config = heuristics.contrast(B, N, D, loss, logits.dtype, launch.architecture(logits))
    stride_hb, align_h = launch.rows_alignment(features)
    stride_zb, align_z = launch.rows_alignment(logits)
    align_n = launch.alignment(N)
    options: dict[str, Any] = {
        "BLOCK_N": config.block_n,
        "ALIGN_Z": align_z,
        "ALIGN_N": align_n,
        "num_warps": config.num_warps,
        **launch.OPTIONS,
    }
    with launch.device_guard(logits):
        if config.kind == "rows":
            kernels.contrast_rows_kernel[(heuristics.cdiv(B, config.rows),)](
                features, logits, out, B, N // align_n, D, stride_hb, features.stride(1), stride_zb, logits.stride(1),
                LOSS=loss, BIAS=bias, LOG=log, MEAN=mean, ROWS=config.rows, BLOCK_D=config.block_d, ALIGN_H=align_h,
                **options,
            )  # fmt: skip
        elif config.kind == "stream":
            kernels.contrast_stream_kernel[(B,)](
                features, logits, out, N // align_n, D, stride_hb, features.stride(1), stride_zb, logits.stride(1),
                LOSS=loss, BIAS=bias, LOG=log, MEAN=mean, BLOCK_D=config.block_d, ALIGN_H=align_h, **options,
            )  # fmt: skip
        else:
            # Chunks are whole blocks, so that every split but the last is full and none is empty.
            chunk_n = heuristics.cdiv(heuristics.cdiv(N, config.splits), config.block_n) * config.block_n
            splits = heuristics.cdiv(N, chunk_n)
            chunk_d = heuristics.cdiv(heuristics.cdiv(D, splits), 16) * 16
            work = launch.empty((10, B, splits), torch.float32, logits)
            kernels.contrast_moments_kernel[(B * splits,)](
                features, logits, work, N // align_n, D, stride_hb, features.stride(1), stride_zb, logits.stride(1),
                splits, chunk_n, chunk_d, LOSS=loss, LOG=log, BLOCK_D=config.block_d, ALIGN_H=align_h, **options,
            )  # fmt: skip
            kernels.contrast_finish_kernel[(B * splits,)](
                logits, work, out, N // align_n, stride_zb, logits.stride(1), splits, chunk_n,
                LOSS=loss, BIAS=bias, LOG=log, MEAN=mean, SPLITS=heuristics.power_of_two(splits), **options,
            )  # fmt: skip
    return out
