"""Exact routes to a convolution's per-sample squared weight-gradient norms.

Each route takes a `Problem` small enough for the cache. The direct routes return the gradients ``G = sum_t g_t p_t`` of
a few samples (``p_t`` the patch under position t), whose squares `run` sums. The Gram route never forms them:
``||G||^2 = sum_{t,t'} (p_t . p_t')(g_t . g_t')``, whose first factor is shared by all K gradients.

A Gram sum rounds relative to its terms, so it loses ``D / ||G||^2`` of its digits, ``D = sum_t |p_t|^2 |g_t|^2``. `run`
measures that ratio and gathers patches for the samples where it is too large; where values cannot be looked at
(tracing, vmap) the Gram matrices are float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgrad.ops.conv.geometry import Problem

#: Largest D / ||G||^2 a float32 Gram result is kept for. Errors of different terms are independent, so the relative
#: error stays near a rounding's 6e-8 * 40 = 2.4e-6. Where all patches are nearly alike it is four times that, 1e-5.
CANCELLATION_LIMIT = 40.0


def _squares(gradient: Tensor) -> Tensor:
    """Return sums of squares, ``(X, K, O, n) -> (X, K)``, in two steps so that float32 keeps its digits."""
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=-1)
    return norms.square().sum(-1)


def _gradient_matrix(p: Problem) -> Tensor:
    """Return g as ``(B * G, K, O, T)``."""
    count, batch = p.g.shape[:2]
    return p.g.reshape(count, batch * p.groups, p.outputs, -1).transpose(0, 1)


def _ungroup(norms: Tensor, p: Problem) -> Tensor:
    """Sum over groups: ``(B * G, K) -> (K, B)``."""
    return norms.reshape(-1, p.groups, norms.shape[1]).sum(1).t()


def windows(x: Tensor, p: Problem) -> Tensor:
    """Return all patches, ``(X, C * taps, positions)``."""
    axes = len(p.kernel)
    for axis, (kernel, stride, dilation) in enumerate(zip(p.kernel, p.stride, p.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)
        if dilation > 1:
            x = x[..., ::dilation]
    columns = x.permute(0, 1, *range(2 + axes, x.dim()), *range(2, 2 + axes))
    return columns.reshape(x.shape[0], x.shape[1] * math.prod(p.kernel), -1)


def _samples(p: Problem) -> Tensor:
    """Return padded a as ``(B * G, C, *L)``."""
    x = p.padded()
    return x.reshape(x.shape[0] * p.groups, p.inputs, *x.shape[2:])


def patch(p: Problem) -> Tensor:
    """Return ``(B * G, K, O, C * taps)``: gather all patches and take one batched product.

    It takes K T O C taps multiply-adds per sample and group.
    """
    # Windows are gathered fastest where the positions of a channel lie side by side.
    columns = windows(_samples(p if math.prod(p.kernel) == 1 else p._replace(a=p.a.contiguous())), p)
    g = _gradient_matrix(p)
    gradient = torch.bmm(g.flatten(1, 2), columns.transpose(1, 2))
    return gradient.view(*g.shape[:3], -1)


def grouped(p: Problem) -> Tensor:
    """Return the same by one call of the library's weight gradient, for a convolution whose groups are the samples."""
    x, pads = p.a, [before for before, _ in p.pads]
    # The library pads both sides alike, and leaves out less than a stride at the end.
    if any(not 0 <= before - after < step for (before, after), step in zip(p.pads, p.stride, strict=True)):
        x, pads = p.padded(), [0] * len(pads)
    (count, batch), outputs = p.g.shape[:2], p.outputs
    g = _gradient_matrix(p)
    # Only its shape is read; a broadcast one would be written out by the operator.
    weight = x.new_empty((batch * p.groups * count * outputs, p.inputs, *p.kernel))
    gradient = torch.ops.aten.convolution_backward(
        g.reshape(1, -1, *p.g.shape[3:]), x.reshape(1, -1, *x.shape[2:]), weight, None, p.stride, pads,
        p.dilation, False, [0] * len(pads), batch * p.groups, [False, True, False],
    )[1]  # fmt: skip
    found: Tensor = gradient.view(batch * p.groups, count, outputs, -1)
    return found


def _quadratic_form(gram: Tensor, p: Problem) -> tuple[Tensor, Tensor]:
    """Return ``sum_{t,t'} gram[t, t'] (g_t . g_t')`` and its diagonal part, both ``(K, B)``."""
    g = _gradient_matrix(p).to(gram.dtype)
    outputs, positions = g.shape[2:]
    if outputs < positions:  # fewer elements in g than in its Gram matrix; one product serves all K
        flat = g.flatten(1, 2)
        moved = torch.bmm(flat, gram) * flat
        norms = moved.view(g.shape).sum(-1).sum(-1, dtype=torch.float64)
        squares = g.square().sum(2)
    else:
        flat = g.flatten(0, 1)
        own = torch.bmm(flat.transpose(1, 2), flat).view(*g.shape[:2], positions, positions)
        squares = own.diagonal(dim1=2, dim2=3)
        norms = (own * gram.unsqueeze(1)).sum(-1).sum(-1, dtype=torch.float64)
    incoherent = (squares * gram.diagonal(dim1=1, dim2=2).unsqueeze(1)).sum(-1)
    return _ungroup(norms, p), _ungroup(incoherent, p)


def _box_filter(gram: Tensor, p: Problem, axis: int) -> Tensor:
    """Sum the copies of a Gram matrix ``(X, *L, *L)`` that one axis of the window reads.

    Pixels outside the image are zero, so a copy only reaches the positions whose pixel lies inside.
    """
    axes, step = len(p.kernel), p.stride[axis]
    size, positions = int(gram.shape[1 + axis]), p.positions[axis]

    def at(places: slice) -> tuple[slice, ...]:
        index = [slice(None)] * (1 + 2 * axes)
        index[1 + axis] = index[1 + axes + axis] = places
        return tuple(index)

    shape = list(gram.shape)
    shape[1 + axis] = shape[1 + axes + axis] = positions
    total = gram.new_zeros(shape)
    for tap in range(p.kernel[axis]):
        start = tap * p.dilation[axis] - p.pads[axis][0]
        first, last = max(0, -(start // step)), min(positions - 1, (size - 1 - start) // step)
        if first <= last:
            seen = gram[at(slice(first * step + start, last * step + start + 1, step))]
            total[at(slice(first, last + 1))] += seen
    return total


def _overlapping_gram(p: Problem, wide: bool) -> Tensor:
    """Return the Gram matrix of overlapping patches, a diagonal box filter of the pixels', for any stride and dilation.

    ``p_t . p_t' = sum_d a[s t + d] . a[s t' + d]``: k shifted copies of the pixels' are added along each axis.
    """
    size = p.image
    reached: tuple[Any, ...] = (..., *map(slice, size))
    x = p.a[reached].reshape(p.a.shape[0] * p.groups, p.inputs, -1)
    if wide:
        x = x.double()
    matrix = torch.bmm(x.transpose(1, 2), x).view(-1, *size, *size)
    for axis in range(len(size)):
        matrix = _box_filter(matrix, p, axis)
    positions = math.prod(p.positions)
    return matrix.view(-1, positions, positions)


def gram(p: Problem, wide: bool = False) -> tuple[Tensor, Tensor]:
    """Return norms by the patches' Gram matrix, and their diagonal part D; cost T^2 (C taps + K O) without overlap."""
    if p.overlaps:
        return _quadratic_form(_overlapping_gram(p, wide), p)
    x = _samples(p)
    columns = windows(x.double() if wide else x, p)
    return _quadratic_form(torch.bmm(columns.transpose(1, 2), columns), p)


DIRECT = {"patch": patch, "grouped": grouped}


def run(route: str, p: Problem) -> Tensor:
    """Return squared norms ``(K, B)`` of one chunk, in its dtype, float32 or float64."""
    if route in DIRECT:
        return _ungroup(_squares(DIRECT[route](p)), p)
    single = p.a.dtype == torch.float32
    norms, incoherent = gram(p, wide=single and not p.guarded)
    if p.guarded and single:
        lost = (norms * CANCELLATION_LIMIT < incoherent).any(0)
        if bool(lost.any()):
            index = lost.nonzero().squeeze(1)
            again = p._replace(a=p.a.index_select(0, index), g=p.g.index_select(1, index))
            norms[:, index] = _ungroup(_squares(patch(again)), again).to(norms.dtype)
    return norms.to(p.a.dtype)
