"""Per-sample weight gradients of convolutions, and the vectors of whose products they are sums."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from fastgrad.losses import compute_dtype
from fastgrad.ops.conv import cost, routes
from fastgrad.ops.conv.geometry import Ints, Problem, padding_of
from fastgrad.ops.conv.sqnorm import shape_of

#: Bytes of one chunk's patches and gradients. The C library reuses blocks below 32 MiB.
CHUNK_BYTES = 24 * 2**20


class Kernel(NamedTuple):
    """A convolution's options per axis."""

    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    transposed: bool


def _problem(a: Tensor, g: Tensor, o: Kernel) -> Problem:
    # A transposed convolution's gradient is the other's, with the two in each other's place.
    dtype = compute_dtype(a.dtype, g.dtype)
    a, g = (t.to(dtype) for t in ((g, a) if o.transposed else (a, g)))
    shapes = tuple(a.shape), (1, *g.shape)
    pads = padding_of(*shapes, o.kernel, o.stride, o.padding, o.dilation, o.groups, o.transposed)
    return Problem(a, g.unsqueeze(0), o.kernel, o.stride, o.dilation, pads, o.groups)


def conv_gradient(a: Tensor, g: Tensor, options: Kernel, inputs: slice = slice(None)) -> Tensor:
    """Return each sample's gradient ``(B, *weight.shape)`` from a layer's input and the gradient at its output.

    ``inputs`` are places in dimension 1 of the weight: the gradient is of these alone.
    """
    p = _problem(a, g, options)
    if inputs != slice(None):
        p = p._replace(a=p.a.unflatten(1, (p.groups, -1))[:, :, inputs].flatten(1, 2))
    samples = p.a.shape[0]
    shape = replace(shape_of(p, itemsize=p.a.element_size()), budget=CHUNK_BYTES)
    route = min((r for r in cost.candidates(shape) if r != "gram"), key=lambda r: cost.seconds(r, shape))
    step = cost.chunk_size(route, shape)
    out = p.a.new_empty(samples, p.g.shape[2], p.a.shape[1] // p.groups, *p.kernel)
    for i in range(0, samples, step):
        own = slice(i, min(i + step, samples))
        found = routes.DIRECT[route](p._replace(a=p.a[own], g=p.g[:, own]))
        if step >= samples:
            return found.reshape(out.shape)
        out[own] = found.reshape(out[own].shape)
    return out


def conv_factors(a: Tensor, g: Tensor, options: Kernel) -> tuple[Tensor, Tensor]:
    """Return ``(B, T, O)`` and ``(B, T, C * taps)``: output gradients and the patches under their positions."""
    p = _problem(a, g, options)
    return p.g[0].flatten(2).mT, routes.windows(p.padded(), p).mT
