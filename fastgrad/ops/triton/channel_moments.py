"""Launcher of the channel moments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrad.kernels import channel_moments as kernels
from fastgrad.ops import tune
from fastgrad.ops.triton import devices
from fastgrad.ops.tune import cdiv


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares over the positions of every channel.

    Args:
        x: ``(B, C, ...)``, positions behind the channels. It is read where it is if its positions are evenly spaced
            in memory, as they are contiguous and channels-last, otherwise from a copy.

    Returns:
        Two float32 tensors ``(B, C)``.
    """
    devices.check(x=x)
    x = x.flatten(2)
    B, C, T = x.shape
    if x.numel() == 0:
        return x.new_zeros((B, C), dtype=torch.float32), x.new_zeros((B, C), dtype=torch.float32)
    # The stride of a single sample, channel or position says nothing about memory.
    stride_b, stride_c, stride_t = (s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))
    channels_last = T == 1 or stride_c < stride_t
    config = tune.channel_moments(B, C, T, channels_last, devices.architecture(x))
    steps = cdiv(T, config.block_t * config.unroll)
    groups = cdiv(steps, config.splits)
    splits = cdiv(steps, groups)
    if channels_last:
        align = devices.alignment(stride_b, stride_t, C)
        C_units, T_units, stride_t = C // align, T, stride_t // align
    else:
        align = devices.alignment(stride_b, stride_c, T)
        C_units, T_units, stride_c = C, T // align, stride_c // align
    sums = devices.empty((splits, B, C), torch.float32, x)
    squares = devices.empty((splits, B, C), torch.float32, x)
    with devices.device_guard(x):
        kernels.channel_moments_kernel[(splits * B * cdiv(C, config.block_c),)](
            x, sums, squares, B, C_units, T_units, stride_b // align, stride_c, stride_t, groups,
            BLOCK_C=config.block_c, BLOCK_T=config.block_t, UNROLL=config.unroll,
            ALIGN=align, CHANNELS_LAST=channels_last, num_warps=config.num_warps, **devices.OPTIONS,
        )  # fmt: skip
    if splits == 1:
        return sums[0], squares[0]
    return sums.sum(0), squares.sum(0)
