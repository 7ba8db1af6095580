"""The schemas of all operators, their shape contracts, and how the last layer's reach their implementations.

The operators live in the namespace ``fastgrad``. Those of the last layer take matrices (any strides) and exist for
the Triton kernels, which a tracer cannot see into: ``torch.compile`` and ``torch.export`` keep them as one node whose
output shapes are stated here. A tensor's device decides what runs: on a GPU the kernel, elsewhere the eager
implementation (on a CPU the kernel where Triton interprets). The eager implementations are plain torch; the public
functions call them directly, so that compilers fuse them and exported files carry no custom operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgrad._torch import check
from fastgrad.losses import compute_dtype
from fastgrad.ops.implementation import choose, interpreting

_T = TypeVar("_T", Tensor, tuple[Tensor, Tensor])

#: Stands for a tensor among an operator's saved arguments.
_TENSOR = object()

_OPTIONS = "str loss, str reduction"
_CONV = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
_CONV_SQNORM = f"(Tensor a, Tensor g, {_CONV}, bool transposed, str? route, str impl) -> Tensor"
_LINEAR_SQNORM = "(Tensor a, Tensor g, str? route, str impl) -> Tensor"

SCHEMAS = {
    "contrast_sqnorm": f"(Tensor features, Tensor logits, bool bias, {_OPTIONS}, bool log) -> Tensor",
    "target_sqnorm": (
        f"(Tensor features, Tensor logits, Tensor? target, str kind, bool bias, {_OPTIONS}, bool log) -> Tensor"
    ),
    "linear_contrast_sqnorm": (
        f"(Tensor features, Tensor weight, Tensor? bias, {_OPTIONS}, bool log) -> (Tensor, Tensor)"
    ),
    "linear_contrast_stats": f"(Tensor features, Tensor weight, Tensor? bias, {_OPTIONS}) -> Tensor",
    # Compositions; and the same as one node, for compilation in this process.
    **dict.fromkeys(("conv_sqnorm", "conv_sqnorm_whole"), _CONV_SQNORM),
    **dict.fromkeys(("linear_sqnorm", "linear_sqnorm_whole"), _LINEAR_SQNORM),
    "conv_sqnorm_kernel": f"(Tensor a, Tensor g, {_CONV}) -> Tensor",
    "linear_sqnorm_kernel": "(Tensor a, Tensor g) -> Tensor",
    # Of a tensor of any shape; its contract stands beside its implementation.
    "channel_moments": "(Tensor x, int dim) -> (Tensor sum, Tensor sum_of_squares)",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fastgrad::{_name}", _schema)


def _paired(features: Tensor, logits: Tensor) -> None:
    check(features.dim() == 2, lambda: f"features must be 2-D; it was {features.dim()}-D")
    check(logits.dim() == 2, lambda: f"logits must be 2-D; it was {logits.dim()}-D")
    check(
        features.shape[0] == logits.shape[0],
        lambda: (
            f"features and logits must have one row a sample; they had {features.shape[0]}, {logits.shape[0]}"
        ),
    )


def _head(features: Tensor, weight: Tensor) -> None:
    check(features.dim() == 2, lambda: f"features must be 2-D; it was {features.dim()}-D")
    check(weight.dim() == 2, lambda: f"weight must be 2-D; it was {weight.dim()}-D")
    check(
        features.shape[1] == weight.shape[1],
        lambda: f"weight must have D={features.shape[1]} columns; it had {weight.shape[1]}",
    )


@torch.library.register_fake("fastgrad::contrast_sqnorm")
def _(features: Tensor, logits: Tensor, *options: Any) -> Tensor:
    _paired(features, logits)
    return logits.new_empty(logits.shape, dtype=compute_dtype(logits.dtype))


@torch.library.register_fake("fastgrad::target_sqnorm")
def _(features: Tensor, logits: Tensor, *options: Any) -> Tensor:
    _paired(features, logits)
    return logits.new_empty(logits.shape[:1], dtype=compute_dtype(logits.dtype))


@torch.library.register_fake("fastgrad::linear_contrast_sqnorm")
def _(features: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _head(features, weight)
    shape = (features.shape[0], weight.shape[0])
    return features.new_empty(shape), features.new_empty(shape, dtype=compute_dtype(features.dtype))


@torch.library.register_fake("fastgrad::linear_contrast_stats")
def _(features: Tensor, weight: Tensor, *options: Any) -> Tensor:
    _head(features, weight)
    return features.new_empty((features.shape[0], 5), dtype=compute_dtype(features.dtype))


@torch.library.register_fake("fastgrad::conv_sqnorm_whole")
@torch.library.register_fake("fastgrad::linear_sqnorm_whole")
def _(a: Tensor, g: Tensor, *options: Any) -> Tensor:
    return g.new_empty(g.shape[:2], dtype=compute_dtype(torch.promote_types(a.dtype, g.dtype)))


@torch.library.register_fake("fastgrad::conv_sqnorm_kernel")
@torch.library.register_fake("fastgrad::linear_sqnorm_kernel")
def _(a: Tensor, g: Tensor, *options: Any) -> Tensor:
    check(g.dim() == a.dim() + 1, lambda: f"g must be {a.dim() + 1}-D; it was {g.dim()}-D")
    return g.new_empty(g.shape[:2], dtype=torch.float32)


def operator(
    name: str,
    eager: Callable[..., _T],
    kernel: Callable[..., _T],
) -> Callable[..., _T]:
    """Register both implementations of an operator of the last layer and return the function that chooses.

    Args:
        name: In ``SCHEMAS``.
        eager: Plain torch for any device; takes what the schema says. It is run again in the backward pass and
            differentiated.
        kernel: The Triton launcher, likewise.

    Returns:
        ``function(*arguments, impl)``, which calls ``eager`` itself or the operator, as `choose` says for the first
        argument.
    """

    def on_cpu(*arguments: Any) -> _T:
        return (kernel if interpreting() else eager)(*arguments)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [_TENSOR if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[: len(ctx.others)]
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if other is _TENSOR else other for other in ctx.others]
        inputs = [x.detach().requires_grad_() if want else x for x, want in zip(inputs, wanted, strict=True)]
        sources = [x for x, want in zip(inputs, wanted, strict=True) if want]
        with torch.enable_grad():
            outputs = eager(*inputs)
        found = iter(torch.autograd.grad(outputs, sources, grads, allow_unused=True))
        return tuple(next(found) if want else None for want in wanted)

    torch.library.impl(f"fastgrad::{name}", "CompositeExplicitAutograd", eager)
    torch.library.impl(f"fastgrad::{name}", "CPU", on_cpu)
    torch.library.impl(f"fastgrad::{name}", "CUDA", kernel)
    torch.library.register_autograd(f"fastgrad::{name}", backward, setup_context=setup)
    overload = getattr(torch.ops.fastgrad, name).default

    def function(*arguments: Any) -> _T:
        *inputs, impl = arguments
        result: _T = (overload if choose(impl, inputs[0]) == "triton" else eager)(*inputs)
        return result

    return function
