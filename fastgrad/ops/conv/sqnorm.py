"""Per-sample squared norms of the weight gradients of convolutions and of linear layers with positions.

``fastgrad::conv_sqnorm`` is a composition of ATen operators, which compilers see through. It is an operator for its
batching rule: under ``vmap`` the gradients of one sample stay the K of one call, which shares what depends only on the
activation. `opaque_ops` makes it one node, which chooses its route when it runs and may look at values.

On a GPU a Triton kernel takes its place. The kernel has no derivative, so ``impl="auto"`` takes ATen's operators if one
is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad._torch import is_readable
from fastgrad.losses import compute_dtype
from fastgrad.ops.conv import cost, routes
from fastgrad.ops.conv.geometry import Problem, canonical
from fastgrad.ops.dispatch import choose, launcher, opaque_ops

#: Batch size assumed by the cost model where a tracer keeps the batch symbolic.
TRACED_BATCH = 16
#: While tracing, chunks become copies of the graph: fewer and larger ones.
TRACED_CHUNK_BYTES = 64 * 2**20


def shape_of(p: Problem, *, guarded: bool = True) -> cost.Shape:
    """Return what the cost model works from: all sizes as ints, a symbolic batch as `TRACED_BATCH`."""
    batch = p.a.shape[0]
    symbolic = isinstance(batch, torch.SymInt)
    return cost.Shape(
        batch=TRACED_BATCH if symbolic else batch,
        count=int(p.g.shape[0]),
        groups=p.groups,
        inputs=int(p.a.shape[1]) // p.groups,
        outputs=int(p.g.shape[2]) // p.groups,
        pixels=p.pixels,
        image=p.image,
        positions=p.positions,
        kernel=p.kernel,
        overlaps=p.overlaps,
        itemsize=compute_dtype(p.a.dtype, p.g.dtype).itemsize,
        guarded=guarded,
        budget=None if symbolic else cost.CHUNK_BYTES if guarded else TRACED_CHUNK_BYTES,
    )


def _solve(p: Problem) -> Tensor:
    """Compute ``(K, B)`` by the cheapest route, chunk by chunk."""
    guarded = is_readable(p.a, p.g) and p.a.device.type == "cpu"  # elsewhere a look would wait for the device
    shape = shape_of(p, guarded=guarded)
    dtype = compute_dtype(p.a.dtype, p.g.dtype)
    if not (shape.batch and all(shape.positions)):
        return p.a.new_zeros((shape.count, p.a.shape[0]), dtype=dtype)
    route = cost.choose_route(shape)
    step = cost.chunk_size(route, shape)
    whole = step >= shape.batch
    pieces = [(p.a, p.g)] if whole else zip(p.a.split(step), p.g.split(step, 1), strict=True)
    parts = [routes.run(route, p._replace(a=a.to(dtype), g=g.to(dtype)), guarded=guarded) for a, g in pieces]
    return parts[0] if whole else torch.cat(parts, 1)


def _eager(
    a: Tensor, g: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, transposed: bool, impl: str,
) -> Tensor:  # fmt: skip
    """Compute ``(K, B)`` by ATen's operators, or by a kernel if `choose` takes Triton."""
    count, batch = g.shape[:2]
    p = canonical(a, g, kernel_size, stride, padding, dilation, groups, transposed)
    differentiated = torch.is_grad_enabled() and (a.requires_grad or g.requires_grad)
    dtype = torch.promote_types(a.dtype, g.dtype)
    if (impl == "auto" and differentiated) or choose(impl, a if dtype == a.dtype else g) == "eager":
        return _solve(p).reshape(count, batch)
    a, g = p.a.to(dtype), p.g.to(dtype)
    if (p.kernel, p.stride, p.pads, groups) == ((1,), (1,), ((0, 0),), 1):
        # Positions along one axis: a linear layer.
        norms: Tensor = torch.ops.fastgrad.linear_sqnorm_kernel(a.mT, g.mT)
    else:
        before = [pair[0] for pair in p.pads]
        norms = torch.ops.fastgrad.conv_sqnorm_kernel(a, g, p.kernel, p.stride, before, p.dilation, groups)
    return norms.reshape(count, batch)


def _composed(a: Tensor, *rest: Any) -> Tensor:
    whole = opaque_ops.get() and a.device.type == "cpu"
    return (torch.ops.fastgrad.conv_sqnorm_whole.default if whole else _eager)(a, *rest)


def _batched(info: Any, in_dims: tuple[int | None, ...], a: Tensor, g: Tensor, *rest: object) -> tuple[Tensor, int]:
    """Fold a mapped dimension into K if only ``g`` carries it, else into the batch."""
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


def _fake(a: Tensor, g: Tensor, *options: Any) -> Tensor:
    return g.new_empty(g.shape[:2], dtype=compute_dtype(a.dtype, g.dtype))


_OPTIONS = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
_SCHEMA = f"(Tensor a, Tensor g, {_OPTIONS}, bool transposed, str impl) -> Tensor"
torch.library.define("fastgrad::conv_sqnorm", _SCHEMA)
torch.library.impl("fastgrad::conv_sqnorm", "CompositeImplicitAutograd", _composed)
torch.library.register_vmap("fastgrad::conv_sqnorm", _batched)
_composition = torch.ops.fastgrad.conv_sqnorm.default
torch.library.define("fastgrad::conv_sqnorm_whole", _SCHEMA)
torch.library.register_fake("fastgrad::conv_sqnorm_whole", _fake)
# A compiler relies on the strides of the fake form, and several gradients a sample come transposed.
torch.library.impl("fastgrad::conv_sqnorm_whole", "CPU", lambda *arguments: _eager(*arguments).contiguous())
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
    single = g.dim() == a.dim()
    # An exported program must not call operators that only this package has. Strict mode, whose frontend cannot follow
    # the cost model, keeps them until `run_decompositions`.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    operator: Callable[..., Tensor] = _eager if exporting else _composition
    norms = operator(
        a, g.unsqueeze(0) if single else g, kernel_size, stride, padding, dilation, groups, transposed, impl
    )
    return norms.squeeze(0) if single else norms


def linear_sqnorm(a: Tensor, g: Tensor, *, impl: str = "auto") -> Tensor:
    """Return the exact squared L2 norm of each sample's weight gradient ``sum_t g_t a_t^T`` of a linear layer.

    Takes the input ``(B, T, C)`` with T positions and the gradient at the output, ``(B, T, O)`` or ``(K, B, T, O)``;
    all else is as in `conv_sqnorm`.
    """
    return conv_sqnorm(a.mT, g.mT, (1,), (1,), (0,), (1,), 1, impl=impl)
