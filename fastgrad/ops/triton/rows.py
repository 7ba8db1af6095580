"""Launcher of a linear layer over the contrast rows, which are never formed."""

from __future__ import annotations

import torch

from fastgrad.kernels import rows as kernels
from fastgrad.ops import heuristics
from fastgrad.ops.triton import launch


def contrast_rows_linear(
    features: torch.Tensor, diagonal: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``F.linear(vec(diagonal h^T), weight, bias)`` without the ``(B, N * D)`` operand in memory.

    Args:
        features: ``(B, D)``, ``h``; any strides.
        diagonal: ``(B, N)`` float32, ``delta^(k)_k`` as ``fastgrad.losses.contrast_diagonal`` gives it.
        weight: ``(U, N * D)`` of the dtype of ``features``; any strides.
        bias: ``(U,)`` or None.

    Returns:
        ``(B, U)`` float32. For half precision each product ``diagonal * h`` is rounded to the dtype of ``features``
        before it is multiplied with the weight, as if the rows had been stored in it.
    """
    launch.check(features=features, diagonal=diagonal, weight=weight)
    if bias is not None:
        launch.check(bias=bias)
    if weight.dtype != features.dtype:
        raise ValueError(
            f"weight must have the dtype of features, {features.dtype}, for impl='triton'; it was {weight.dtype}"
        )
    (B, D), N, U = features.shape, diagonal.shape[1], weight.shape[0]
    out = launch.empty((B, U), torch.float32, features)
    if B == 0 or U == 0:
        return out
    config = heuristics.rows_linear(B, N, D, U, features.dtype, launch.architecture(features))
    tiles = heuristics.cdiv(B, config.block_m) * heuristics.cdiv(U, config.block_u)
    steps = heuristics.cdiv(D, config.block_k) * N
    per_part = heuristics.cdiv(steps, config.parts)
    parts = heuristics.cdiv(steps, per_part)
    stride_hb, align_h = launch.rows_alignment(features)
    stride_vu, align_v = launch.rows_alignment(weight)
    align_d = launch.alignment(D)
    split = parts > 1
    with launch.device_guard(features):
        work = launch.empty((parts, B, U), torch.float32, features) if split else out
        sync = torch.zeros(tiles, dtype=torch.int32, device=features.device) if split else out
        kernels.rows_linear_kernel[(tiles * parts,)](
            features, diagonal, weight, bias.contiguous() if bias is not None else weight, out, work, sync,
            B, U, N, D // align_d, stride_hb, features.stride(1), diagonal.stride(0), diagonal.stride(1),
            stride_vu, weight.stride(1), parts, per_part,
            HAS_BIAS=bias is not None, SPLIT=split, BLOCK_M=config.block_m, BLOCK_U=config.block_u,
            BLOCK_K=config.block_k, EVEN_K=D % config.block_k == 0, PRECISION=config.precision,
            UPCAST=launch.upcast(features), ALIGN_H=align_h, ALIGN_V=align_v, ALIGN_D=align_d,
            num_warps=config.num_warps, num_stages=config.num_stages, **launch.OPTIONS,
        )  # fmt: skip
    return out
