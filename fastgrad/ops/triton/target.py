"""Launcher of the squared norms for one fixed target per sample."""

from __future__ import annotations

import torch

from fastgrad.kernels import target as kernels
from fastgrad.ops import tune
from fastgrad.ops.triton import devices

KINDS = ("ones", "uniform", "predicted", "indices", "soft")


def target_sqnorm(
    features: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor | None,
    kind: str,
    loss: str,
    bias: bool,
    log: bool,
    mean: bool,
) -> torch.Tensor:
    """Squared norm for one target per sample, ``(B,)`` float32, of features ``(B, D)`` and logits ``(B, N)``.

    ``target`` is ``(B,)`` int64 for ``indices``, ``(B, N)`` of a floating dtype for ``soft``, else None. An index
    outside ``[0, N)`` gives NaN: reading it back to raise would wait for the device.
    """
    devices.check(features=features, logits=logits)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; it was {kind!r}")
    (B, D), N = features.shape, logits.shape[1]
    out = devices.empty((B,), torch.float32, logits)
    if B == 0:
        return out
    if kind in ("indices", "soft"):
        if target is None:
            raise ValueError(f"target must be a tensor for kind={kind!r}; it was None")
        y = target
    else:
        y = logits
    config = tune.target(B, N, D, logits.dtype, devices.architecture(logits))
    stride_hb, align_h = devices.rows_alignment(features)
    stride_zb, align_z = devices.rows_alignment(logits)
    stride_yb, align_y = devices.rows_alignment(y)
    align_n = devices.alignment(N)
    with devices.device_guard(logits):
        kernels.target_sqnorm_kernel[(tune.cdiv(B, config.rows),)](
            features, logits, y, out, B, N // align_n, D,
            stride_hb, features.stride(1), stride_zb, logits.stride(1), stride_yb, y.stride(-1),
            LOSS=loss, KIND=kind, BIAS=bias, LOG=log, MEAN=mean,
            ROWS=config.rows, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
            ALIGN_H=align_h, ALIGN_Z=align_z, ALIGN_Y=align_y, ALIGN_N=align_n, num_warps=config.num_warps,
            **devices.OPTIONS,
        )  # fmt: skip
    return out
