"""Launcher of the all-contrast squared norms."""

from __future__ import annotations

from typing import Any

import torch

from fastgrad.kernels import contrast as kernels
from fastgrad.kernels.losses import PLANES
from fastgrad.ops import tune
from fastgrad.ops.triton import devices


def contrast_sqnorm(
    features: torch.Tensor, logits: torch.Tensor, loss: str, bias: bool, log: bool, mean: bool
) -> torch.Tensor:
    """Squared norms for every one-hot contrast, ``(B, N)`` float32, of features ``(B, D)`` and logits ``(B, N)``."""
    devices.check(features=features, logits=logits)
    (B, D), N = features.shape, logits.shape[1]
    out = devices.empty((B, N), torch.float32, logits)
    if B == 0 or N == 0:
        return out
    config = tune.contrast(B, N, D, loss, logits.dtype, devices.architecture(logits))
    stride_hb, align_h = devices.rows_alignment(features)
    stride_zb, align_z = devices.rows_alignment(logits)
    align_n = devices.alignment(N)
    options: dict[str, Any] = {
        "BLOCK_N": config.block_n,
        "ALIGN_Z": align_z,
        "ALIGN_N": align_n,
        "num_warps": config.num_warps,
        **devices.OPTIONS,
    }
    with devices.device_guard(logits):
        if config.kind == "rows":
            kernels.contrast_rows_kernel[(tune.cdiv(B, config.rows),)](
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
            chunk_n, splits = chunks_of(N, config.splits, config.block_n)
            chunk_d = tune.cdiv(tune.cdiv(D, splits), 16) * 16
            work = devices.empty((PLANES, B, splits), torch.float32, logits)
            kernels.contrast_moments_kernel[(B * splits,)](
                features, logits, work, N // align_n, D, stride_hb, features.stride(1), stride_zb, logits.stride(1),
                splits, chunk_n, chunk_d, LOSS=loss, LOG=log, BLOCK_D=config.block_d, ALIGN_H=align_h, **options,
            )  # fmt: skip
            finish(
                logits, work, out, splits, (splits, 1), splits, config.block_n,
                LOSS=loss, BIAS=bias, LOG=log, MEAN=mean, PARTS=tune.power_of_two(splits),
                num_warps=config.num_warps,
            )  # fmt: skip
    return out


def chunks_of(N: int, chunks: int, block: int) -> tuple[int, int]:
    """Columns of a chunk, whole blocks so that all but the last are full, and the number of chunks, none empty."""
    chunk = tune.cdiv(tune.cdiv(N, chunks), block) * block
    return chunk, tune.cdiv(N, chunk)


def finish(
    logits: torch.Tensor,
    work: torch.Tensor,
    out: torch.Tensor,
    parts: int,
    strides: tuple[int, int],
    chunks: int,
    block_n: int,
    **options: Any,
) -> None:
    """Launch ``contrast_finish_kernel``: from partial moments and logits to norms.

    Args:
        logits: ``(B, N)``; any strides.
        work: ``(PLANES, ...)`` float32, the moments of ``parts`` parts a row.
        out: ``(B, N)`` float32, contiguous.
        parts: Parts of a row.
        strides: Of ``work``, from a row to the next and from a part to the next.
        chunks: Programs a row.
        block_n: Columns per step.
        options: Constants of the kernel and ``num_warps``.
    """
    B, N = logits.shape
    stride_zb, align_z = devices.rows_alignment(logits)
    align_n = devices.alignment(N)
    chunk_n, chunks = chunks_of(N, chunks, block_n)
    kernels.contrast_finish_kernel[(B * chunks,)](
        logits, work, out, N // align_n, stride_zb, logits.stride(1), parts, *strides, work.stride(0), chunks, chunk_n,
        BLOCK_N=block_n, ALIGN_Z=align_z, ALIGN_N=align_n, **options, **devices.OPTIONS,
    )  # fmt: skip
