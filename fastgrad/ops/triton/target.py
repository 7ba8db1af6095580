"""Launcher of the squared norms for one fixed target per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrad.checks import one_of
from fastgrad.kernels import target as kernels
from fastgrad.ops import tune
from fastgrad.ops.triton import devices

KINDS = ("ones", "uniform", "predicted", "indices", "soft")


def target_sqnorm(
    features: Tensor, logits: Tensor, target: Tensor | None, kind: str, loss: str, bias: bool, log: bool, mean: bool
) -> Tensor:
    """Squared norm for one target per sample, ``(B,)`` float32, of features ``(B, D)`` and logits ``(B, N)``.

    ``target`` is ``(B,)`` int64 for ``indices``, ``(B, N)`` of a floating dtype for ``soft``, else None. An index
    outside ``[0, N)`` gives NaN: reading it back to raise would wait for the device.
    """
    devices.check(features=features, logits=logits)
    one_of("kind", kind, KINDS)
    (B, D), N = features.shape, logits.shape[1]
    out = devices.empty((B,), torch.float32, logits)
    if B == 0:
        return out
    if target is None and kind in ("indices", "soft"):
        raise ValueError(f"target must be a tensor for kind={kind!r}; it was None")
    y = logits if target is None else target
    config = tune.target(B, N, D, devices.architecture(logits))
    strides_h, align_h = devices.strides(features)
    strides_z, align_z = devices.strides(logits)
    strides_y, align_y = devices.strides(y)
    align_n = devices.alignment(N)
    kernels.target_sqnorm_kernel[(tune.cdiv(B, config.rows),)](
        features, logits, y, out, B, N // align_n, D, *strides_h, *strides_z, *strides_y,
        LOSS=loss, KIND=kind, BIAS=bias, LOG=log, MEAN=mean,
        ROWS=config.rows, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
        ALIGN_H=align_h, ALIGN_Z=align_z, ALIGN_Y=align_y, ALIGN_N=align_n,
        num_warps=config.num_warps, **devices.OPTIONS,
    )  # fmt: skip
    return out
