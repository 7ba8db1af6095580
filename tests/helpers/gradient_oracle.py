"""Per-sample gradient norms, and sums of clipped gradients, by a plain float64 autograd loop; the comparison."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastgrad
from fastgrad.ops.conv import sqnorm
from fastgrad.ops.conv.geometry import Kernel, per_axis

#: By whether they are transposed, of one, two and three dimensions.
CONVOLUTIONS: dict[bool, tuple[Callable[..., Tensor], ...]] = {
    False: (F.conv1d, F.conv2d, F.conv3d),
    True: (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


def doubled(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


def sample_gradients(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of each of the losses, one a sample, in float64."""
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        yield [torch.zeros_like(p, dtype=torch.float64) if g is None else g.to_dense().double() for g, p in pairs]


def loss_norms(losses: Iterable[Tensor], model: nn.Module) -> Tensor:
    """``(B, P)``: squared norms of the gradients of each of the losses, one a sample, by trainable parameter."""
    rows = sample_gradients(losses, [p for p in model.parameters() if p.requires_grad])
    return torch.stack([torch.stack([g.square().sum() for g in row]) for row in rows])


def true_norms(
    model: nn.Module,
    inputs: tuple[Any, ...],
    gradient: Callable[[int, Tensor], Tensor],
    *,
    output: Callable[[Any], Tensor] = lambda out: out,
    dtype: torch.dtype = torch.float64,
    batched: bool = False,
    **kwargs: Any,
) -> Tensor:
    """``(B, P)``; ``gradient(i, output)`` gives the output gradient of sample i.

    ``batched`` runs the forward pass on all samples at once: the same numbers but for rounding, as libraries choose
    their algorithms by the batch size.
    """
    model = copy.deepcopy(model).to(dtype).eval()
    model.requires_grad_()
    samples = next(t for t in pytree.tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)).shape[0]

    def sample(t: Tensor, i: int) -> Tensor:
        return t[i : i + 1] if t.dim() and t.shape[0] == samples else t

    def run(tree: Any) -> Tensor:
        args, keywords = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)
        return output(model(*args, **keywords))

    together = run((inputs, kwargs)) if batched else None

    def loss(i: int) -> Tensor:
        if together is not None:
            out = together[i : i + 1]
        else:
            out = run(pytree.tree_map_only(Tensor, functools.partial(sample, i=i), (inputs, kwargs)))
        return (out * gradient(i, out.detach()).to(out)).sum()

    return loss_norms(map(loss, range(samples)), model)


def clipped_gradients(
    model: nn.Module, x: Tensor, losses: Callable[[Tensor, Tensor], Tensor], limit: float, *, cast: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Norms of all samples, and the sum of their gradients clipped to the limit, by trainable parameter.

    ``losses(output, x)`` are those of the samples. With ``cast``, of one forward pass in bfloat16: its rounding
    can change the sign before a ReLU, and float64 would then measure the dtype, not the gradients.
    """
    model = copy.deepcopy(model) if cast else copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, norms = [torch.zeros_like(p, dtype=torch.float64) for p in parameters], []
    if cast:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        each: Iterable[Tensor] = losses(out.float(), x)
    else:
        each = (losses(model(row), row).sum() for row in doubled(x).split(1))
    for grads in sample_gradients(each, parameters):
        norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
        for t, g in zip(total, grads, strict=True):
            t += (limit / norms[-1]).clamp(max=1) * g
    return torch.stack(norms), total


def weight_norms(a: Tensor, g: Tensor, weight: tuple[int, ...], *, transposed: bool = False, **options: Any) -> Tensor:
    """Norms ``(K, B)`` of a convolution's weight gradients from its inputs and K gradients of its outputs."""
    a, g = a.double(), g.double()
    convolution = CONVOLUTIONS[transposed][a.dim() - 3]
    norms = torch.empty(g.shape[:2], dtype=torch.float64)
    for k, b in itertools.product(range(len(g)), range(len(a))):
        zero = torch.zeros(weight, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(convolution(a[b : b + 1], zero, **options), zero, g[k, b : b + 1])
        norms[k, b] = gradient.square().sum()
    return norms


def conv_sqnorm(
    a: Tensor, g: Tensor, kernel: Any, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1, impl: str = "auto",
    **options: Any,
) -> Tensor:  # fmt: skip
    """The operator, which takes a number for each axis, with one for all."""
    k, s, p, d = (per_axis(n, a.dim() - 2) for n in (kernel, stride, padding, dilation))
    return sqnorm.conv_sqnorm(a, g, Kernel(k, s, p, d, **options), impl=impl)


def relative_error(value: Tensor, truth: Tensor, eps: float) -> Tensor:
    """Largest relative error of each column.

    A gradient that vanishes in exact arithmetic (an attention's key bias) is only rounding errors of the sums
    it is made of, so an error below ``(100 eps)^2`` times the sample's largest squared norm counts as none.
    """
    floor = (100 * eps) ** 2 * truth.amax(1, keepdim=True)
    return (((value.double() - truth).abs() - floor).clamp_min(0) / truth.clamp_min(1e-300)).amax(0)


def check_module(module: nn.Module, x: Tensor, *, eps: float | None = None, seed: int = 0) -> None:
    """Compare ``grad_sqnorm`` on one module with the loop, for a random output gradient."""
    module = module.eval()
    with torch.no_grad():
        out = module(x)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    with fastgrad.record(module):
        found = fastgrad.grad_sqnorm(module(x), list(module.parameters()), grad_outputs=gradient.to(out.dtype))

    truth = true_norms(module, (x,), lambda i, _: gradient[i : i + 1])
    eps = torch.finfo(out.dtype).eps if eps is None else eps
    # Sums of up to some thousand products, each rounded to eps, and squares of their sums.
    error = relative_error(torch.stack(found, 1), truth, eps)
    assert error.max() <= 500 * eps, dict(zip((n for n, _ in module.named_parameters()), error.tolist(), strict=True))
