"""Launchers of the layer kernels: per-sample squared weight-gradient norms of convolutions and linear layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrad.kernels import layer_sqnorm as kernels
from fastgrad.ops import tune
from fastgrad.ops.conv.routes import CANCELLATION_LIMIT
from fastgrad.ops.triton import devices
from fastgrad.ops.tune import cdiv

#: Most programs of one launch; with eight waves each, they have half of the 2^32 threads that HIP takes.
PROGRAMS = 1 << 22


def _three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """Return per-axis values for (d, h, w), missing axes first."""
    return (fill,) * (3 - len(values)) + tuple(values)


def _along_channels(x: Tensor, dim: int, groups: int) -> Tensor:
    """Return ``x`` with contiguous channels if a group has 16 or more: a warp's loads run along the channels."""
    if x.stride(dim) == 1 or x.shape[dim] < 16 * groups:
        return x
    return x.movedim(dim, -1).contiguous().movedim(-1, dim)


def conv_sqnorm(
    a: Tensor, g: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, flag: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the squared norm of every sample's weight gradient of a convolution, ``(K, B)`` float32.

    Input ``(B, G * C, *spatial)`` and gradients ``(K, B, G * O, *spatial)`` are of one dtype. ``padding`` is before
    each axis; positions past either end read as zero. With ``flag``, int32 ``(K, B)``, samples not set get 0.
    """
    a, g = _along_channels(a, 1, groups), _along_channels(g, 2, groups)
    count, batch = g.shape[:2]
    axes = a.dim() - 2
    inputs, outputs = a.shape[1] // groups, g.shape[2] // groups
    config = tune.layer_direct(inputs, outputs, math.prod(g.shape[3:]), a.dtype, devices.architecture(a))
    tiles = (cdiv(outputs, config["BLOCK_O"]), math.prod(kernel), cdiv(inputs, config["BLOCK_C"]))
    out = devices.empty((count, batch, groups * math.prod(tiles)), torch.float32, a)
    for before in range(0, out.numel(), PROGRAMS):
        kernels.direct_kernel[(min(PROGRAMS, out.numel() - before),)](
            a, g, out, flag, before, batch, groups, inputs, outputs,
            *_three(a.shape[2:], 1), *_three(g.shape[3:], 1), *_three(kernel, 1), *_three(stride, 1),
            *_three(dilation, 1), *_three(padding, 0),
            *a.stride()[:2], *_three(a.stride()[-axes:], 0), *g.stride()[:3], *_three(g.stride()[-axes:], 0),
            FLAGGED=flag is not None, UPCAST=devices.upcast(a), **config, **devices.OPTIONS,
        )  # fmt: skip
    return out.sum(2)


def linear_sqnorm(a: Tensor, g: Tensor) -> Tensor:
    """Return squared norms of all weight gradients, ``(K, B)`` float32, for ``a (B, T, C)`` and ``g (K, B, T, O)``.

    The Gram kernel runs if it takes fewer products. The direct one then recomputes samples whose gradient nearly
    cancels over positions, without a decision on the host.
    """
    count, batch, positions, outputs = g.shape
    inputs = a.shape[2]
    direct = functools.partial(conv_sqnorm, a.mT, g.mT, (1,), (1,), (0,), (1,), 1)
    if not tune.layer_prefers_gram(inputs, outputs, positions) or not g.numel():
        return direct()
    config = tune.layer_gram(positions, a.dtype, devices.architecture(a))
    tiles = cdiv(positions, config["BLOCK_T"])
    pairs = tiles * (tiles + 1) // 2
    work = devices.empty((2, count, batch, pairs), torch.float32, a)
    kernels.gram_kernel[(count * batch * pairs,)](
        a, g, work[0], work[1], batch, positions, inputs, outputs, tiles, pairs, *a.stride(), *g.stride(),
        UPCAST=devices.upcast(a), **config, **devices.OPTIONS,
    )  # fmt: skip
    norms, incoherent = work.sum(3, dtype=torch.float64)
    cancelled = norms * CANCELLATION_LIMIT < incoherent
    return torch.where(cancelled, direct(flag=cancelled.to(torch.int32)), norms.float())
