"""The inputs of the network's cases, and other ways to per-sample gradient norms and to sums of clipped gradients."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgrad
from bench.micro.models import Network
from bench.registry import SEED, scaled_error

Norms = Callable[[], Tensor]
Check = Callable[[Tensor], float]
Gradients = Callable[[], list[Tensor]]
#: Bytes of gradients that ``vmap`` may hold at once.
MEMORY = 1 << 30
BCE, CE = "bce ones", "cross_entropy predicted"
#: Error allowed for a plain product of float32, relative to its largest entry.
UNIT = 256 * torch.finfo(torch.float32).eps


class Task:
    """A network in evaluation mode, a batch, and the loss of a signal, `BCE` or `CE`."""

    def __init__(self, network: Network, batch: int, device: str, signal: str = BCE) -> None:
        build, inputs = network
        torch.manual_seed(SEED)
        self.model = build().eval().to(device)
        self.x = inputs(batch, torch.Generator().manual_seed(SEED)).to(device)
        self.signal = signal

    def loss(self, logits: Tensor) -> Tensor:
        """Return the sum over samples."""
        if self.signal == BCE:
            return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="sum")
        return F.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")

    def double(self) -> Task:
        one = copy.copy(self)
        one.model = copy.deepcopy(self.model).double()
        one.x = self.x.double() if self.x.is_floating_point() else self.x
        return one

    @cached_property
    def _wanted(self) -> list[Tensor]:
        exact = self.double()
        return [sqnorms(exact.loss(exact.model(x)), exact.model) for x in (exact.x[:1], exact.x[-1:])]

    def error(self, norms: Tensor) -> float:
        """Return the relative error of ``(B, P)`` on the first and last sample."""
        worst = max(map(error, (norms[0], norms[-1]), self._wanted))
        return worst if bool(torch.isfinite(norms).all()) else float("inf")

    def against(self, call: Callable[[Task], Norms], error: Callable[..., float] = scaled_error) -> Check:
        """Return the check against the same call in float64."""
        return lambda found: error(found, call(self.double())())


class ClippedTask(Task):
    """The same in training mode, with a label for every sample and the norm to clip to."""

    def __init__(self, network: Network, batch: int, device: str) -> None:
        super().__init__(network, batch, device)
        self.model.train()
        self.y = torch.arange(batch, device=device) % 10
        self.max_norm = 1.0

    def loss(self, logits: Tensor, reduction: str = "sum") -> Tensor:
        """Return the sum over samples, or with ``reduction="none"`` each loss."""
        return F.cross_entropy(logits, self.y, reduction=reduction)

    def distance(self, gradients: Iterable[Tensor]) -> float:
        """Return the relative distance from the sum of a float64 loop's clipped gradients."""
        return float((_flat(gradients).double() - self.exact).norm() / self.exact.norm())

    @cached_property
    def exact(self) -> Tensor:
        """Return the sum of a float64 loop's clipped gradients, flat."""
        return self._loop(self.double())

    @cached_property
    def rounding(self) -> float:
        """Return the distance of the same loop in the network's own precision: what its rounding costs any method."""
        return self.distance([self._loop(self)])

    def _loop(self, task: Task) -> Tensor:
        total: Any = 0
        for x, y in zip(task.x, self.y, strict=True):
            loss = F.cross_entropy(task.model(x[None]), y[None])
            gradient = _flat(torch.autograd.grad(loss, list(task.model.parameters())))
            total = total + min(1.0, self.max_norm / float(gradient.norm())) * gradient
        found: Tensor = total
        return found


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def sqnorms(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.stack([g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))])


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest error relative to the norm plus 1e-12 of the sum of all norms."""
    return float(((found.double() - wanted).abs() / (wanted + 1e-12 * wanted.sum())).max())


def middle_error(found: Tensor, wanted: Tensor) -> float:
    """Return the median of the samples' errors: at the kink of a ReLU, rounding gives another gradient."""
    return statistics.median(map(scaled_error, found, wanted))


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


def vmap(task: Task) -> Norms:
    """PyTorch's tutorial on per-sample gradients, in chunks that keep the gradients within `MEMORY`."""
    parameters, buffers = _state(task.model)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return task.loss(functional_call(task.model, (parameters, buffers), (sample.unsqueeze(0),)))

    def norms(sample: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in grad(loss)(parameters, sample).values()])

    batched = torch.func.vmap(norms, randomness="different", chunk_size=_chunk(task))
    return _batching(lambda: batched(task.x))


def loop(task: Task) -> Norms:
    return lambda: torch.stack([sqnorms(task.loss(task.model(sample[None])), task.model) for sample in task.x])


def clipped(task: ClippedTask) -> Gradients:
    def backward() -> None:
        with fastgrad.clip_gradients(task.model, task.max_norm) as clipped:
            clipped.backward(task.loss(task.model(task.x), "none"))

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
    return _gradients(model, lambda: wrapped(task.loss(model(task.x), "none")).backward())


def clipped_by_vmap(task: ClippedTask) -> Gradients:
    parameters, buffers = _state(task.model)

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(task.model, (parameters, buffers), (x[None],)), y[None])

    each, chunk = torch.func.vmap(grad(loss), in_dims=(None, 0, 0)), _chunk(task)

    def call() -> list[Tensor]:
        totals = [torch.zeros_like(p) for p in parameters.values()]
        for x, y in zip(task.x.split(chunk), task.y.split(chunk), strict=True):
            found = list(each(parameters, x, y).values())
            norms = torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0).sqrt()
            factors = (task.max_norm / norms).clamp(max=1)
            for total, g in zip(totals, found, strict=True):
                total += torch.einsum("b,b...->...", factors, g)
        return totals

    return _batching(call)


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: p.detach() for name, p in model.named_parameters()}, dict(model.named_buffers())


def _chunk(task: Task) -> int:
    return max(1, min(len(task.x), MEMORY // sum(p.nbytes for p in task.model.parameters())))


def _batching(call: Callable[[], Any]) -> Callable[[], Any]:
    """Avoid the CPU's fused attention, which has no batching rule and would run sample by sample."""
    return sdpa_kernel(SDPBackend.MATH)(call)  # type: ignore[operator, no-any-return]


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
