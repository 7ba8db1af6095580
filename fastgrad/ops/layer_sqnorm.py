"""Per-sample squared norms of the weight gradients of convolutions and of linear layers with positions.

On the CPU these are compositions of ATen operators: ``torch.compile``, ``torch.export`` and ``make_fx`` see
through them, and an exported file needs nothing of this package.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastgrad import checks
from fastgrad.ops import conv_cost, conv_routes
from fastgrad.ops.conv_geometry import Problem, canonical

#: Batch size assumed by the cost model where a tracer keeps the batch symbolic.
TRACED_BATCH = 16


def _readable(*tensors: Tensor) -> bool:
    """Whether Python may look at values: not while tracing or under a functorch transform."""
    return not (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(isinstance(t, FakeTensor) or is_functorch_wrapped_tensor(t) for t in tensors)
    )


def shape_of(p: Problem, *, guarded: bool = True) -> conv_cost.Shape:
    """The static description the cost model works from."""
    batch = p.a.shape[0]
    symbolic = isinstance(batch, torch.SymInt)
    return conv_cost.Shape(
        batch=TRACED_BATCH if symbolic else batch,
        count=p.g.shape[0],
        groups=p.groups,
        inputs=p.a.shape[1] // p.groups,
        outputs=p.g.shape[2] // p.groups,
        size=tuple(n + sum(pair) for n, pair in zip(p.a.shape[2:], p.pads, strict=True)),
        positions=tuple(p.g.shape[3:]),
        kernel=p.kernel,
        stride=p.stride,
        itemsize=8 if torch.float64 in (p.a.dtype, p.g.dtype) else 4,
        guarded=guarded,
        chunked=not symbolic,
    )


def _solve(p: Problem, route: str | None) -> Tensor:
    """``(K, B)`` by the given or the cheapest route, chunk by chunk."""
    guarded = _readable(p.a, p.g) and p.a.device.type == "cpu"
    shape = shape_of(p, guarded=guarded)
    if route is None:
        route = conv_cost.choose_route(shape)
    else:
        checks.one_of("route", route, conv_routes.ROUTES)
        refusal = conv_routes.applicable(route, p)
        if refusal is not None:
            raise ValueError(f"route must suit the convolution; it was {route!r}, but {refusal}")
    dtype = torch.float64 if shape.itemsize == 8 else torch.float32
    if not shape.batch:
        return p.a.new_zeros((shape.count, 0), dtype=dtype)
    direct = conv_cost.choose_direct(shape)
    step = conv_cost.chunk_size(route, shape)
    if not shape.chunked or step >= shape.batch:
        return conv_routes.run(
            route, p._replace(a=p.a.to(dtype), g=p.g.to(dtype)), guarded=guarded, fallback=direct
        )
    parts = []
    for start in range(0, shape.batch, step):
        part = p._replace(a=p.a[start : start + step].to(dtype), g=p.g[:, start : start + step].to(dtype))
        parts.append(conv_routes.run(route, part, guarded=guarded, fallback=direct))
    return torch.cat(parts, 1)


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
        route: One of ``"patch"``, ``"rows"``, ``"grouped"``, ``"taps"``, ``"patch_gram"``, ``"box_gram"``;
            the cheapest by the cost model if None.

    Returns:
        ``(B,)`` or ``(K, B)``: float64 if either tensor is, else float32.

    Raises:
        TypeError: If ``a`` or ``g`` is no floating tensor.
        ValueError: Naming the argument whose shape does not fit.
    """
    p = canonical(a, g, kernel_size, stride, padding, dilation, groups, transposed)
    norms = _solve(p, route)
    return norms.reshape(g.shape[: g.dim() - a.dim() + 1]) if transposed or g.dim() == a.dim() else norms


def linear_sqnorm(a: Tensor, g: Tensor, *, route: str | None = None) -> Tensor:
    """Squared L2 norm of each sample's weight gradient ``sum_t g_t a_t^T`` of a linear layer, exact.

    Args:
        a: Input, ``(B, T, C)`` with T positions.
        g: Gradient at the output, ``(B, T, O)`` or ``(K, B, T, O)``.
        route: ``"patch"`` (direct), ``"patch_gram"`` or ``"grouped"``; the cheapest if None.

    Returns:
        ``(B,)`` or ``(K, B)``: float64 if either tensor is, else float32.
    """
    checks.is_float("a", a)
    checks.is_float("g", g)
    if a.dim() != 3:
        raise ValueError(f"a must be (B, T, C); its shape was {tuple(a.shape)}")
    if g.dim() not in (3, 4):
        raise ValueError(f"g must be (B, T, O) or (K, B, T, O); its shape was {tuple(g.shape)}")
    return conv_sqnorm(a.transpose(1, 2), g.transpose(-1, -2), 1, route=route)
