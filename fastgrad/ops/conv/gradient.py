"""Per-sample weight gradients of convolutions, and the vectors of whose products they are sums."""

from __future__ import annotations

from torch import Tensor

from fastgrad.losses import compute_dtype
from fastgrad.ops.conv import cost, routes
from fastgrad.ops.conv.geometry import Kernel, Problem, problem_of

#: Bytes of one chunk's patches and gradients. The C library reuses blocks below 32 MiB.
CHUNK_BYTES = 24 * 2**20


def _problem(a: Tensor, g: Tensor, kernel: Kernel) -> Problem:
    dtype = compute_dtype(a.dtype, g.dtype)
    return problem_of(a.to(dtype), g.to(dtype).unsqueeze(0), kernel)


def conv_gradient(a: Tensor, g: Tensor, kernel: Kernel, inputs: slice = slice(None)) -> Tensor:
    """Return each sample's gradient ``(B, *weight.shape)`` from a layer's input and the gradient at its output.

    ``inputs`` are places in dimension 1 of the weight: the gradient is of these alone.
    """
    p = _problem(a, g, kernel)
    if inputs != slice(None):
        p = p._replace(a=p.a.unflatten(1, (p.groups, -1))[:, :, inputs].flatten(1, 2))
    samples = p.a.shape[0]
    route = min((r for r in cost.candidates(p) if r != "gram"), key=lambda r: cost.seconds(r, p, CHUNK_BYTES))
    step = cost.chunk_size(route, p, CHUNK_BYTES)
    out = p.a.new_empty(samples, p.g.shape[2], p.inputs, *p.kernel)
    for i in range(0, samples, step):
        own = slice(i, min(i + step, samples))
        found = routes.DIRECT[route](p._replace(a=p.a[own], g=p.g[:, own]))
        if step >= samples:
            return found.reshape(out.shape)
        out[own] = found.reshape(out[own].shape)
    return out


def conv_factors(a: Tensor, g: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Return ``(B, T, O)`` and ``(B, T, C * taps)``: output gradients and the patches under their positions."""
    p = _problem(a, g, kernel)
    return p.g[0].flatten(2).mT, routes.windows(p.padded(), p).mT
