"""The sum of clipped gradients by Opacus and by functorch, and the plain step beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgrad
from bench.micro.tasks import ClippedTask

Call = Callable[[], list[Tensor]]


def ours(task: ClippedTask) -> Call:
    def call() -> list[Tensor]:
        task.model.zero_grad()
        with fastgrad.clip_gradients(task.model, task.max_norm) as clipped:
            clipped.backward(task.losses(task.model))
        return _gradients(task.model)

    return call


def step(task: ClippedTask) -> Call:
    def call() -> list[Tensor]:
        task.model.zero_grad()
        task.losses(task.model).sum().backward()
        return _gradients(task.model)

    return call


def opacus_hooks(task: ClippedTask) -> Call:
    """Per-sample gradients from hooks, clipped by Opacus' optimizer."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(copy.deepcopy(task.model), loss_reduction="sum")
    optimizer = _optimizer(DPOptimizer, model, task)

    def call() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        task.losses(model).sum().backward()
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in model.parameters()]

    return call


def opacus_ghost(task: ClippedTask) -> Call:
    """Opacus' ghost clipping, which is two backward passes as well."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    model = GradSampleModuleFastGradientClipping(
        copy.deepcopy(task.model), loss_reduction="sum", max_grad_norm=task.max_norm, use_ghost_clipping=True
    )
    optimizer = _optimizer(DPOptimizerFastGradientClipping, model, task)

    def call() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        DPTensorFastGradientClipping(model, optimizer, task.losses(model), "sum").backward()
        return _gradients(model)

    return call


def functorch(task: ClippedTask, memory: int = 1 << 30) -> Call:
    """PyTorch's tutorial on per-sample gradients, in chunks that keep the gradients within ``memory`` bytes."""
    from torch.func import functional_call, grad, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = {name: p.detach() for name, p in task.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(task.model, parameters, (x[None],)), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    chunk = max(1, min(len(task.x), memory // sum(p.numel() * p.element_size() for p in parameters.values())))

    def call() -> list[Tensor]:
        totals: list[Tensor] = [torch.zeros_like(p) for p in parameters.values()]
        # The fused attention of a CPU has no batching rule and would run sample by sample.
        with sdpa_kernel(SDPBackend.MATH):
            for x, y in zip(task.x.split(chunk), task.y.split(chunk), strict=True):
                found = list(each(parameters, x, y).values())
                norms = torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0).sqrt()
                factors = (task.max_norm / norms).clamp(max=1)
                for total, g in zip(totals, found, strict=True):
                    total += torch.einsum("b,b...->...", factors, g)
        return totals

    return call


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _optimizer(kind: Any, model: nn.Module, task: ClippedTask) -> Any:
    """Opacus' optimizer, without noise."""
    return kind(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=task.max_norm,
        expected_batch_size=len(task.x), loss_reduction="sum",
    )  # fmt: skip
