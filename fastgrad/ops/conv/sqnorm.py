"""Per-sample squared norms of the weight gradients of convolutions and of linear layers with positions.

On a CPU they are compositions of ATen operators, whose route a cost model picks by the shape. On a GPU a Triton kernel
takes their place. Several gradients of a sample, also those that ``vmap`` maps over, are the K of one call, which
shares what depends only on the activation.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import functorch, lowered
from fastgrad.losses import compute_dtype
from fastgrad.ops.conv import cost, routes
from fastgrad.ops.conv.geometry import Ints, Kernel, Problem, problem_of
from fastgrad.ops.dispatch import choose, launcher, product_refusal


@functools.lru_cache(maxsize=4096)
def plan(a: Ints, g: Ints, options: tuple[Any, ...], dtype: torch.dtype) -> tuple[str, int]:
    """Return the route of a `Problem` of these shapes and other fields, and how many samples it takes at a time."""
    p = Problem(torch.empty(a, dtype=dtype, device="meta"), torch.empty(g, dtype=dtype, device="meta"), *options)
    route = cost.choose_route(p)
    return route, cost.chunk_size(route, p, cost.CHUNK_BYTES)


def _solve(a: Tensor, g: Tensor, kernel: Kernel, impl: str) -> Tensor:
    """Compute ``(K, B)``: by the cheapest route, chunk by chunk, or by a kernel if `choose` takes Triton."""
    count, batch = g.shape[:2]
    p = problem_of(a, g, kernel)
    a, g, dtype = p.a, p.g, compute_dtype(a.dtype, g.dtype)
    if not g.numel():
        return a.new_zeros((count, batch), dtype=dtype)
    # The kernel has no derivative.
    differentiated = torch.is_grad_enabled() and (a.requires_grad or g.requires_grad)
    common = torch.promote_types(a.dtype, g.dtype)
    plain = impl == "auto" and (p.guarded or differentiated)
    if plain or choose(impl, a.to(common), product_refusal(a.device)) == "eager":
        route, step = plan(tuple(a.shape), tuple(g.shape), p[2:], dtype)
        whole = step >= a.shape[0]
        pieces = [(a, g)] if whole else zip(a.split(step), g.split(step, 1), strict=True)
        parts = [routes.run(route, p._replace(a=x.to(dtype), g=y.to(dtype))) for x, y in pieces]
        norms = parts[0] if whole else torch.cat(parts, 1)
    elif (p.kernel, p.stride, p.pads, p.groups) == ((1,), (1,), ((0, 0),), 1):
        # Positions along one axis: a linear layer.
        norms = torch.ops.fastgrad.linear_sqnorm_kernel(a.to(common).mT, g.to(common).mT)
    else:
        before = [pair[0] for pair in p.pads]
        operator = torch.ops.fastgrad.conv_sqnorm_kernel
        norms = operator(a.to(common), g.to(common), p.kernel, p.stride, before, p.dilation, p.groups)
    return norms.reshape(count, batch)


def _fake(a: Tensor, g: Tensor, *options: Any) -> Tensor:
    return g.new_empty(g.shape[:2], dtype=compute_dtype(a.dtype, g.dtype))


_OPTIONS = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
for _name, _inputs in (("conv_sqnorm", f"Tensor a, Tensor g, {_OPTIONS}"), ("linear_sqnorm", "Tensor a, Tensor g")):
    torch.library.define(f"fastgrad::{_name}_kernel", f"({_inputs}) -> Tensor")
    torch.library.register_fake(f"fastgrad::{_name}_kernel", _fake)
    # On the CPU the launcher works only in Triton's interpreter.
    torch.library.impl(f"fastgrad::{_name}_kernel", ("CUDA", "CPU"), launcher("layer_sqnorm", _name))


def conv_sqnorm(a: Tensor, g: Tensor, kernel: Kernel, *, impl: str = "auto") -> Tensor:
    """Return the exact squared L2 norm of each sample's weight gradient of a convolution.

    Takes the layer's input ``(B, C_in, *spatial)`` with one to three spatial axes, and the gradient at its output,
    ``(B, C_out, *spatial)``, or ``(K, B, C_out, *spatial)`` for K gradients per sample, which share what depends only
    on ``a``; any strides. ``(B,)`` or ``(K, B)``, float64 for float64, else float32.
    """
    if functorch.is_batchedtensor(g) and not functorch.is_batchedtensor(a):
        level, dim, every = functorch.maybe_get_level(g), functorch.maybe_get_bdim(g), functorch.get_unwrapped(g)
        with lowered():
            every = every.movedim(dim, 0)
            flat = every.flatten(0, every.dim() - a.dim() - 1) if every.dim() > a.dim() + 1 else every
            norms = conv_sqnorm(a, flat, kernel, impl=impl).reshape(*every.shape[: every.dim() - a.dim()], -1)
        mapped: Tensor = functorch._add_batch_dim(norms, 0, level)
        return mapped
    single = g.dim() == a.dim()
    norms = _solve(a, g.unsqueeze(0) if single else g, kernel, impl)
    return norms.squeeze(0) if single else norms


_LINEAR = Kernel((1,), (1,), (0,), (1,))


def linear_sqnorm(a: Tensor, g: Tensor, *, impl: str = "auto") -> Tensor:
    """Return the exact squared L2 norm of each sample's weight gradient ``sum_t g_t a_t^T`` of a linear layer.

    Takes the input ``(B, T, C)`` with T positions and the gradient at the output, ``(B, T, O)`` or ``(K, B, T, O)``;
    all else is as in `conv_sqnorm`.
    """
    return conv_sqnorm(a.mT, g.mT, _LINEAR, impl=impl)
