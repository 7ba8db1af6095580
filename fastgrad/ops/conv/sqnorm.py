"""Per-sample squared norms of the weight gradients of convolutions and of linear layers with positions.

On a CPU they are compositions of ATen operators, whose route a cost model picks by the shape. On a GPU a Triton kernel
takes their place. Several gradients of a sample, also those that ``vmap`` maps over, are the K of one call, which
shares what depends only on the activation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import functorch, is_batched, lowered
from fastgrad.losses import compute_dtype
from fastgrad.ops.conv import cost, routes
from fastgrad.ops.conv.geometry import Ints, Problem, padding_of
from fastgrad.ops.dispatch import choose, launcher


class Plan(NamedTuple):
    """What a call's shapes decide."""

    pads: tuple[tuple[int, int], ...]
    route: str
    step: int  # samples at a time


@functools.lru_cache(maxsize=4096)
def plan(
    a: Ints, g: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int, swapped: bool,
    itemsize: int, guarded: bool,
) -> Plan:  # fmt: skip
    """Return the plan for inputs and gradients of these shapes, ``(B, C, *L)`` and ``(K, B, O, *T)``.

    Raises:
        ValueError: Naming the argument whose shape does not fit.
    """
    pads = padding_of(a, g, kernel, stride, padding, dilation, groups, swapped)
    p = Problem(torch.empty(a, device="meta"), torch.empty(g, device="meta"), kernel, stride, dilation, pads, groups)
    shape = shape_of(p, itemsize=itemsize, guarded=guarded)
    if not (shape.batch and all(shape.positions)):
        return Plan(pads, "", 0)
    route = cost.choose_route(shape)
    return Plan(pads, route, cost.chunk_size(route, shape))


def shape_of(p: Problem, *, itemsize: int = 4, guarded: bool = True) -> cost.Shape:
    """Return what the cost model works from."""
    return cost.Shape(
        batch=p.a.shape[0],
        count=p.g.shape[0],
        groups=p.groups,
        inputs=p.a.shape[1] // p.groups,
        outputs=p.g.shape[2] // p.groups,
        pixels=p.pixels,
        image=p.image,
        positions=p.positions,
        kernel=p.kernel,
        overlaps=p.overlaps,
        itemsize=itemsize,
        guarded=guarded,
        budget=cost.CHUNK_BYTES,
    )


def _solve(
    a: Tensor, g: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int, transposed: bool,
    impl: str,
) -> Tensor:  # fmt: skip
    """Compute ``(K, B)``: by the cheapest route, chunk by chunk, or by a kernel if `choose` takes Triton."""
    count, batch = g.shape[:2]
    if transposed:
        # y = conv_transpose(x): dL/dW[i, o, d] = sum_t x[i, t] gy[o, stride t + d]; the two swap roles.
        # Several gradients then share no activation, so they join the batch.
        a, g = g.flatten(0, 1), a.expand(count, *a.shape).flatten(0, 1).unsqueeze(0)
    dtype = compute_dtype(a.dtype, g.dtype)
    guarded = a.device.type == "cpu"  # elsewhere a look at values would wait for the device
    shapes = tuple(a.shape), tuple(g.shape)
    pads, route, step = plan(*shapes, kernel, stride, padding, dilation, groups, transposed, dtype.itemsize, guarded)
    p = Problem(a, g, kernel, stride, dilation, pads, groups)
    if not route:
        return a.new_zeros((count, batch), dtype=dtype)
    # The kernel has no derivative.
    differentiated = torch.is_grad_enabled() and (a.requires_grad or g.requires_grad)
    common = torch.promote_types(a.dtype, g.dtype)
    if (impl == "auto" and (guarded or differentiated)) or choose(impl, a.to(common)) == "eager":
        whole = step >= a.shape[0]
        pieces = [(a, g)] if whole else zip(a.split(step), g.split(step, 1), strict=True)
        parts = [routes.run(route, p._replace(a=x.to(dtype), g=y.to(dtype)), guarded=guarded) for x, y in pieces]
        norms = parts[0] if whole else torch.cat(parts, 1)
    elif (kernel, stride, pads, groups) == ((1,), (1,), ((0, 0),), 1):
        # Positions along one axis: a linear layer.
        norms = torch.ops.fastgrad.linear_sqnorm_kernel(a.to(common).mT, g.to(common).mT)
    else:
        before = [pair[0] for pair in pads]
        operator = torch.ops.fastgrad.conv_sqnorm_kernel
        norms = operator(a.to(common), g.to(common), kernel, stride, before, dilation, groups)
    return norms.reshape(count, batch)


def _fake(a: Tensor, g: Tensor, *options: Any) -> Tensor:
    return g.new_empty(g.shape[:2], dtype=compute_dtype(a.dtype, g.dtype))


_OPTIONS = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
for _name, _inputs in (("conv_sqnorm", f"Tensor a, Tensor g, {_OPTIONS}"), ("linear_sqnorm", "Tensor a, Tensor g")):
    torch.library.define(f"fastgrad::{_name}_kernel", f"({_inputs}) -> Tensor")
    torch.library.register_fake(f"fastgrad::{_name}_kernel", _fake)
    # On the CPU the launcher works only in Triton's interpreter.
    torch.library.impl(f"fastgrad::{_name}_kernel", ("CUDA", "CPU"), launcher("layer_sqnorm", _name))


def conv_sqnorm(
    a: Tensor, g: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, *, transposed: bool = False, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return the exact squared L2 norm of each sample's weight gradient of a convolution.

    Takes the layer's input ``(B, C_in, *spatial)`` with one to three spatial axes, and the gradient at its output,
    ``(B, C_out, *spatial)``, or ``(K, B, C_out, *spatial)`` for K gradients per sample, which share what depends only
    on ``a``; any strides. Kernel, stride, padding (with zeros, on both sides) and dilation are per axis. A
    ``transposed`` convolution may have output padding. ``(B,)`` or ``(K, B)``, float64 for float64, else float32.

    Raises:
        TypeError: If ``a`` or ``g`` is no floating tensor.
        ValueError: Naming the argument whose shape does not fit.
    """
    checks.is_float("a", a)
    checks.is_float("g", g)
    if is_batched(g) and not is_batched(a):
        level, dim, every = functorch.maybe_get_level(g), functorch.maybe_get_bdim(g), functorch.get_unwrapped(g)
        with lowered():
            every = every.movedim(dim, 0)
            flat = every.flatten(0, every.dim() - a.dim() - 1) if every.dim() > a.dim() + 1 else every
            norms = conv_sqnorm(
                a, flat, kernel_size, stride, padding, dilation, groups, transposed=transposed, impl=impl
            ).reshape(*every.shape[: every.dim() - a.dim()], -1)
        mapped: Tensor = functorch._add_batch_dim(norms, 0, level)
        return mapped
    single = g.dim() == a.dim()
    sizes = tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
    norms = _solve(a, g.unsqueeze(0) if single else g, *sizes, groups, transposed, impl)
    return norms.squeeze(0) if single else norms


def linear_sqnorm(a: Tensor, g: Tensor, *, impl: str = "auto") -> Tensor:
    """Return the exact squared L2 norm of each sample's weight gradient ``sum_t g_t a_t^T`` of a linear layer.

    Takes the input ``(B, T, C)`` with T positions and the gradient at the output, ``(B, T, O)`` or ``(K, B, T, O)``;
    all else is as in `conv_sqnorm`.
    """
    return conv_sqnorm(a.mT, g.mT, (1,), (1,), (0,), (1,), 1, impl=impl)
