"""Per-sample squared norms of the weight gradients of convolutions and of linear layers with positions.

``fastgrad::conv_sqnorm`` is a composition of ATen operators, which compilers see through. It is an operator for its
batching rule: under ``vmap`` the gradients of one sample stay the K of one call, which shares what depends on the
activation alone. `opaque_ops` makes one node of it for a compilation in this process, where it chooses its route by
looking at values.

On a GPU it is one node of a Triton kernel. That has no derivative, so ``impl="auto"`` takes ATen's operators where one
is asked for.
"""

from __future__ import annotations

import contextvars
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import is_readable
from fastgrad.ops.conv import cost, routes
from fastgrad.ops.conv.geometry import Problem, canonical, per_axis
from fastgrad.ops.dispatch import bind_contextvar, choose, launcher

#: Batch size assumed by the cost model where a tracer keeps the batch symbolic.
TRACED_BATCH = 16
#: While tracing, chunks become copies of the graph: fewer and larger ones.
TRACED_CHUNK_BYTES = 64 * 2**20

_whole: contextvars.ContextVar[bool] = contextvars.ContextVar("fastgrad_sqnorm_whole", default=False)


def opaque_ops() -> AbstractContextManager[None]:
    """Graphs traced inside hold the two operators of tensors on a CPU as one node each."""
    return bind_contextvar(_whole, True)


def shape_of(p: Problem, *, guarded: bool = True) -> cost.Shape:
    """What the cost model works from: all sizes as ints, a symbolic batch as `TRACED_BATCH`."""
    batch = p.a.shape[0]
    symbolic = isinstance(batch, torch.SymInt)
    return cost.Shape(
        batch=TRACED_BATCH if symbolic else batch,
        count=int(p.g.shape[0]),
        groups=p.groups,
        inputs=int(p.a.shape[1]) // p.groups,
        outputs=int(p.g.shape[2]) // p.groups,
        size=tuple(int(n) + sum(pair) for n, pair in zip(p.a.shape[2:], p.pads, strict=True)),
        image=tuple(int(n) + min(0, after) for n, (_, after) in zip(p.a.shape[2:], p.pads, strict=True)),
        positions=tuple(int(n) for n in p.g.shape[3:]),
        kernel=p.kernel,
        overlaps=p.overlaps,
        itemsize=8 if torch.float64 in (p.a.dtype, p.g.dtype) else 4,
        guarded=guarded,
        budget=None if symbolic else cost.CHUNK_BYTES if guarded else TRACED_CHUNK_BYTES,
    )


def _solve(p: Problem, route: str | None) -> Tensor:
    """``(K, B)`` by the given or the cheapest route, chunk by chunk."""
    guarded = is_readable(p.a, p.g) and p.a.device.type == "cpu"  # elsewhere a look would wait for the device
    shape = shape_of(p, guarded=guarded)
    if route is None:
        route = cost.choose_route(shape)
    else:
        checks.one_of("route", route, routes.ROUTES)
    dtype = torch.float64 if shape.itemsize == 8 else torch.float32
    if not shape.batch:
        return p.a.new_zeros((shape.count, 0), dtype=dtype)
    direct = cost.choose_direct(shape)
    step = cost.chunk_size(route, shape)
    if step >= shape.batch:
        return routes.run(route, p._replace(a=p.a.to(dtype), g=p.g.to(dtype)), guarded=guarded, fallback=direct)
    parts = []
    for start in range(0, shape.batch, step):
        part = p._replace(a=p.a[start : start + step].to(dtype), g=p.g[:, start : start + step].to(dtype))
        parts.append(routes.run(route, part, guarded=guarded, fallback=direct))
    return torch.cat(parts, 1)


def _kernel_operands(a: Tensor, g: Tensor, route: str | None, impl: str) -> tuple[Tensor, Tensor] | None:
    """``a`` and ``g`` in one dtype if a Triton kernel is to serve them, else None."""
    differentiated = torch.is_grad_enabled() and (a.requires_grad or g.requires_grad)
    if impl == "auto" and (route is not None or differentiated):
        return None
    dtype = torch.promote_types(a.dtype, g.dtype)
    if choose(impl, a if dtype == a.dtype else g) == "eager":
        return None
    if route is not None:
        raise ValueError(f"route must be None for impl='triton', which has its own; it was {route!r}")
    return a.to(dtype), g.to(dtype)


def _eager(
    a: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    route: str | None,
    impl: str,
) -> Tensor:
    count, batch = g.shape[:2]
    p = canonical(a, g, kernel_size, stride, padding, dilation, groups, transposed)
    operands = _kernel_operands(p.a, p.g, route, impl)
    if operands is None:
        norms = _solve(p, route)
    elif (p.kernel, p.stride, p.pads, groups) == ((1,), (1,), ((0, 0),), 1):
        # Positions along one axis: a linear layer.
        norms = torch.ops.fastgrad.linear_sqnorm_kernel(operands[0].mT, operands[1].mT)
    else:
        before = [pair[0] for pair in p.pads]
        norms = torch.ops.fastgrad.conv_sqnorm_kernel(*operands, p.kernel, p.stride, before, p.dilation, groups)
    return norms.reshape(count, batch)


_composition = torch.ops.fastgrad.conv_sqnorm.default
_whole_operator = torch.ops.fastgrad.conv_sqnorm_whole.default


def _composed(a: Tensor, *rest: Any) -> Tensor:
    return (_whole_operator if _whole.get() and a.device.type == "cpu" else _eager)(a, *rest)


def _batched(info: Any, in_dims: tuple[int | None, ...], a: Tensor, g: Tensor, *rest: object) -> tuple[Tensor, int]:
    """Fold a mapped dimension into K where only ``g`` carries it, else into the batch."""
    size = info.batch_size
    a_dim, g_dim = in_dims[:2]
    g = g.unsqueeze(0).expand(size, *g.shape) if g_dim is None else g.movedim(g_dim, 0)
    count, batch = g.shape[1:3]
    if a_dim is None:
        norms = _composition(a, g.flatten(0, 1), *rest)
        return norms.reshape(size, count, batch), 0
    a = a.movedim(a_dim, 0)
    norms = _composition(a.flatten(0, 1), g.transpose(0, 1).flatten(1, 2), *rest)
    return norms.reshape(count, size, batch), 1


torch.library.impl("fastgrad::conv_sqnorm", "CompositeImplicitAutograd", _composed)
torch.library.register_vmap("fastgrad::conv_sqnorm", _batched)
# A compiler relies on the strides of the fake form, and several gradients a sample come transposed.
torch.library.impl("fastgrad::conv_sqnorm_whole", "CPU", lambda *arguments: _eager(*arguments).contiguous())
for _name, _key in itertools.product(("conv_sqnorm", "linear_sqnorm"), ("CUDA", "CPU")):
    # On the CPU the launcher accepts Triton's interpreter alone.
    torch.library.impl(f"fastgrad::{_name}_kernel", _key, launcher("layer_sqnorm", _name))


def conv_sqnorm(
    a: Tensor,
    g: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    route: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Squared L2 norm of each sample's weight gradient of a convolution, exact.

    Args:
        a: Input of the layer, ``(B, C_in, *spatial)`` with one to three spatial axes, any strides.
        g: Gradient at its output, ``(B, C_out, *spatial)``, or ``(K, B, C_out, *spatial)`` for K gradients
            per sample, which share whatever depends on ``a`` alone.
        kernel_size: Kernel size, per axis or one int for all.
        stride: Likewise.
        padding: Zeros on both sides of each axis, likewise. For other padding modes pad ``a`` beforehand.
        dilation: Likewise.
        groups: Channel groups.
        transposed: Whether the layer is a transposed convolution (``a`` its input, ``g`` at its output, which
            may include output padding).
        route: ``"patch"``, ``"grouped"`` or ``"gram"``; the cheapest by the cost model if None.
        impl: ``"auto"`` (a Triton kernel on a GPU), ``"triton"`` or ``"eager"``.

    Returns:
        ``(B,)`` or ``(K, B)``: float64 if either tensor is, else float32.

    Raises:
        TypeError: If ``a`` or ``g`` is no floating tensor.
        ValueError: Naming the argument whose shape does not fit.
    """
    checks.is_float("a", a)
    checks.is_float("g", g)
    axes = a.dim() - 2
    if axes not in (1, 2, 3):
        raise ValueError(f"a must be (B, C, *spatial), 1 to 3 spatial axes; its shape was {tuple(a.shape)}")
    if g.dim() not in (a.dim(), a.dim() + 1):
        raise ValueError(
            f"g must have as many dimensions as a, or one more in front for several gradients per sample; "
            f"its shape was {tuple(g.shape)} beside {tuple(a.shape)}"
        )
    # An exported program must not call operators that only this package has. Strict mode, whose frontend cannot follow
    # the cost model, keeps them until `run_decompositions`.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    op = _eager if exporting else _composition
    norms = op(
        a,
        g if g.dim() > a.dim() else g.unsqueeze(0),
        per_axis("kernel_size", kernel_size, axes),
        per_axis("stride", stride, axes),
        per_axis("padding", padding, axes),
        per_axis("dilation", dilation, axes),
        groups,
        transposed,
        route,
        impl,
    )
    return norms if g.dim() > a.dim() else norms.squeeze(0)


def linear_sqnorm(a: Tensor, g: Tensor, *, route: str | None = None, impl: str = "auto") -> Tensor:
    """Squared L2 norm of each sample's weight gradient ``sum_t g_t a_t^T`` of a linear layer, exact.

    Args:
        a: Input, ``(B, T, C)`` with T positions.
        g: Gradient at the output, ``(B, T, O)`` or ``(K, B, T, O)``.
        route: As in `conv_sqnorm`.
        impl: ``"auto"`` (a Triton kernel on a GPU), ``"triton"`` or ``"eager"``.

    Returns:
        ``(B,)`` or ``(K, B)``: float64 if either tensor is, else float32.
    """
    checks.is_float("a", a)
    checks.is_float("g", g)
    if a.dim() != 3:
        raise ValueError(f"a must be (B, T, C); its shape was {tuple(a.shape)}")
    if g.dim() not in (3, 4):
        raise ValueError(f"g must be (B, T, O) or (K, B, T, O); its shape was {tuple(g.shape)}")
    return conv_sqnorm(a.mT, g.mT, 1, route=route, impl=impl)
