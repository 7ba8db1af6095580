"""Other ways to per-sample gradient norms and to sums of clipped gradients; each function returns the timed call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgrad
from bench.micro.tasks import ClippedTask, Task, sqnorms

Norms = Callable[[], Tensor]
Gradients = Callable[[], list[Tensor]]
#: Bytes of gradients that ``vmap`` may hold at once.
MEMORY = 1 << 30


def step(task: Task) -> Norms:
    parameters = list(task.model.parameters())
    return lambda: torch.autograd.grad(task.loss(task.model(task.x)), parameters)[-1]


def forward(task: Task) -> Norms:
    return torch.no_grad()(lambda: task.model(task.x))


def data_gradients(task: Task) -> Norms:
    """Run what every exact method begins with: forward pass, and backward pass without a parameter's gradient.

    It goes back to the images or, if the inputs are tokens, to the first parameter, the embedding.
    """
    model = copy.deepcopy(task.model).requires_grad_(False)
    if task.x.is_floating_point():
        x = leaf = task.x.detach().requires_grad_()
    else:
        x, leaf = task.x, next(model.parameters()).requires_grad_()
    return lambda: torch.autograd.grad(task.loss(model(x)), leaf)[0]


def backpack(task: Task) -> Norms:
    """Run BackPACK as its documentation says: extend the model, and call backward inside the context."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model = extend(copy.deepcopy(task.model))

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        with backpack(BatchL2Grad()):
            task.loss(model(task.x)).backward()
        return torch.stack([p.batch_l2 for p in model.parameters()], -1)

    return call


def opacus(task: Task) -> Norms:
    """Run Opacus' ghost clipping up to the norms; its hooks need training mode, so networks with batch norm fail."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in task.model.modules()):
        raise ValueError("Opacus refuses batch norm")
    net = copy.deepcopy(task.model).train()
    model = GradSampleModuleFastGradientClipping(net, loss_reduction="sum", use_ghost_clipping=True)

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        task.loss(model(task.x)).backward()
        return torch.stack([p._norm_sample for p in model.trainable_parameters], -1).square()

    return call


def loop(task: Task) -> Norms:
    return lambda: torch.stack([sqnorms(task.gradient(i)) for i in range(len(task.x))])


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: p.detach() for name, p in model.named_parameters()}, dict(model.named_buffers())


def of_sample(task: Task) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Return the function that PyTorch's tutorial on per-sample gradients vectorises: a sample's, given its label."""
    parameters, buffers = state(task.model)

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return task.losses(functional_call(task.model, (parameters, buffers), (x[None],)), y[None]).sum()

    return lambda x, y: list(grad(loss)(parameters, x, y).values())


def batching(call: Callable[[], Any]) -> Callable[[], Any]:
    """Avoid the CPU's fused attention, which has no batching rule and would run sample by sample."""
    return sdpa_kernel(SDPBackend.MATH)(call)  # type: ignore[operator, no-any-return]


def _chunk(task: Task) -> int:
    """Return how many samples' gradients stay within `MEMORY`."""
    return max(1, min(len(task.x), MEMORY // sum(p.nbytes for p in task.model.parameters())))


def vmap(task: Task) -> Norms:
    gradients = of_sample(task)
    norms = torch.func.vmap(lambda x, y: sqnorms(gradients(x, y)), randomness="different", chunk_size=_chunk(task))
    return batching(lambda: norms(task.x, task.y))


def clipped(task: ClippedTask) -> Gradients:
    def backward() -> None:
        with fastgrad.clip_gradients(task.model, task.max_norm) as clipped:
            clipped.backward(task.losses(task.model(task.x), task.y))

    return _gradients(task.model, backward)


def clipped_by_hooks(task: ClippedTask) -> Gradients:
    """Per-sample gradients from hooks, clipped by Opacus' optimizer."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(copy.deepcopy(task.model), loss_reduction="sum")
    optimizer = _optimizer(DPOptimizer, model, task)

    def call() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        task.loss(model(task.x)).backward()
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in model.parameters()]

    return call


def clipped_by_ghosts(task: ClippedTask) -> Gradients:
    """Opacus' ghost clipping, which takes two backward passes as well."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    how = {"loss_reduction": "sum", "max_grad_norm": task.max_norm, "use_ghost_clipping": True}
    model = GradSampleModuleFastGradientClipping(copy.deepcopy(task.model), **how)
    optimizer = _optimizer(DPOptimizerFastGradientClipping, model, task)
    wrapped = partial(DPTensorFastGradientClipping, model, optimizer, loss_reduction="sum")
    return _gradients(model, lambda: wrapped(task.losses(model(task.x), task.y)).backward())


def clipped_by_vmap(task: ClippedTask) -> Gradients:
    each, chunk = torch.func.vmap(of_sample(task)), _chunk(task)

    def call() -> list[Tensor]:
        totals = [torch.zeros_like(p) for p in task.model.parameters()]
        for x, y in zip(task.x.split(chunk), task.y.split(chunk), strict=True):
            found = each(x, y)
            norms = torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0).sqrt()
            factors = (task.max_norm / norms).clamp(max=1)
            for total, g in zip(totals, found, strict=True):
                total += torch.einsum("b,b...->...", factors, g)
        return totals

    return batching(call)


def _gradients(model: nn.Module, backward: Callable[[], None]) -> Gradients:
    """Return a function that computes all gradients anew."""

    def call() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    return call


def _optimizer(kind: Any, model: nn.Module, task: ClippedTask) -> Any:
    """Return Opacus' optimizer, without noise."""
    return kind(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=task.max_norm,
        expected_batch_size=len(task.x), loss_reduction="sum",
    )  # fmt: skip
