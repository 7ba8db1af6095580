"""Other ways to per-sample gradient norms, and the training step beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.micro.tasks import BCE, Task, first_leaf


def step(task: Task, compiled: bool = False) -> Callable[[], Tensor]:
    parameters = list(task.model.parameters())
    model = torch.compile(task.model, dynamic=False) if compiled else task.model

    def call() -> Tensor:
        return torch.autograd.grad(task.loss(model(task.x)), parameters)[-1]

    return call


def forward(task: Task) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            out: Tensor = task.model(task.x)
        return out

    return call


def data_gradients(task: Task) -> Callable[[], Tensor]:
    """What every exact method begins with: the forward pass, and the backward pass without a parameter's gradient.

    It goes back to the images, or to the first parameter, the embedding, where the input are tokens.
    """
    model = copy.deepcopy(task.model).requires_grad_(False)
    x, leaf = first_leaf(model, task.x)

    def call() -> Tensor:
        return torch.autograd.grad(task.loss(model(x)), leaf)[0]

    return call


def backpack(task: Task) -> Callable[[], Tensor]:
    """As in BackPACK's documentation: extend the model and the loss, backward inside the context."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model = extend(copy.deepcopy(task.model))
    if task.signal == BCE:
        loss_function = extend(nn.BCEWithLogitsLoss(reduction="sum"))
    else:
        loss_function = extend(nn.CrossEntropyLoss(reduction="sum"))

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        logits = model(task.x)
        labels = torch.ones_like(logits) if task.signal == BCE else logits.detach().argmax(-1)
        with backpack(BatchL2Grad()):
            loss_function(logits, labels).backward()
        return torch.stack([p.batch_l2 for p in model.parameters()], -1)

    return call


def opacus(task: Task) -> Callable[[], Tensor]:
    """Opacus's ghost clipping up to the norms; its hooks work in training mode, so networks with batch norm fail."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in task.model.modules()):
        raise ValueError("Opacus refuses batch norm")
    model = GradSampleModuleFastGradientClipping(
        copy.deepcopy(task.model).train(), loss_reduction="sum", use_ghost_clipping=True
    )

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        task.loss(model(task.x)).backward()
        return torch.stack([p._norm_sample for p in model.trainable_parameters], -1).square()

    return call


def vmap(task: Task, memory: int = 1 << 30) -> Callable[[], Tensor]:
    """PyTorch's tutorial on per-sample gradients, in chunks that keep the gradients within ``memory`` bytes."""
    from torch.func import functional_call, grad, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = dict(task.model.named_parameters())
    buffers = dict(task.model.named_buffers())
    detached = {name: p.detach() for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        logits = functional_call(task.model, (parameters, buffers), (sample.unsqueeze(0),))
        return task.loss(logits)

    size = sum(p.numel() * p.element_size() for p in detached.values())
    chunk = max(1, min(len(task.x), memory // size))

    def norms(sample: Tensor) -> Tensor:
        grads = grad(loss)(detached, sample)
        return torch.stack([g.square().sum() for g in grads.values()])

    batched = vmap(norms, randomness="different", chunk_size=chunk)

    def call() -> Tensor:
        # The fused attention of a CPU has no batching rule and would run sample by sample.
        with sdpa_kernel(SDPBackend.MATH):
            return batched(task.x)

    return call


def loop(task: Task) -> Callable[[], Tensor]:
    parameters = list(task.model.parameters())

    def call() -> Tensor:
        rows = []
        for sample in task.x:
            grads = torch.autograd.grad(task.loss(task.model(sample.unsqueeze(0))), parameters)
            rows.append(torch.stack([g.square().sum() for g in grads]))
        return torch.stack(rows)

    return call
