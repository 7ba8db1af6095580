"""The inputs of the network's cases, and the float64 gradients by which their results are checked."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.micro.models import Network
from bench.registry import SEED, scaled_error

#: Losses and their labels: all ones, the predicted class, a class for every sample.
BCE, CE, LABELS = "bce ones", "cross_entropy predicted", "cross_entropy labels"
#: Error allowed for a plain product of float32, relative to its largest entry.
UNIT = 256 * torch.finfo(torch.float32).eps


class Task:
    """A network in evaluation mode, a batch with labels ``y``, and the loss of a signal: `BCE`, `CE` or `LABELS`."""

    def __init__(self, network: Network, batch: int, device: str, signal: str = BCE) -> None:
        build, inputs = network
        torch.manual_seed(SEED)
        self.model = build().eval().to(device)
        self.x = inputs(batch, torch.Generator().manual_seed(SEED)).to(device)
        self.y = torch.arange(batch, device=device) % 10
        self.signal = signal

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the loss ``(B,)`` of every sample."""
        if self.signal == BCE:
            return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none").sum(1)
        labels = y if self.signal == LABELS else logits.detach().argmax(-1)
        return F.cross_entropy(logits, labels, reduction="none")

    def loss(self, logits: Tensor) -> Tensor:
        """Return the sum over samples."""
        return self.losses(logits, self.y).sum()

    def labelled(self, y: Tensor) -> Task:
        """Return the same with the loss of these labels."""
        one = copy.copy(self)
        one.signal, one.y = LABELS, y
        return one

    def double(self) -> Task:
        one = copy.copy(self)
        one.model = copy.deepcopy(self.model).double()
        one.x = self.x.double() if self.x.is_floating_point() else self.x
        return one

    def gradient(self, i: int) -> list[Tensor]:
        """Return the gradients of one sample alone, by a backward pass of its own."""
        loss = self.losses(self.model(self.x[i : i + 1]), self.y[i : i + 1]).sum()
        return list(torch.autograd.grad(loss, list(self.model.parameters()), materialize_grads=True))

    @cached_property
    def wanted(self) -> list[Tensor]:
        """Return the squared norms ``(P,)`` of the first and the last sample's gradient of every parameter."""
        exact = self.double()
        return [sqnorms(exact.gradient(i)) for i in (0, len(self.x) - 1)]

    def error(self, norms: Tensor) -> float:
        """Return the relative error of ``(B, P)`` on the first and last sample."""
        worst = max(map(norm_error, (norms[0], norms[-1]), self.wanted))
        return worst if bool(torch.isfinite(norms).all()) else float("inf")

    def against(
        self, call: Callable[[Task], Callable[[], Tensor]], error: Callable[..., float] = scaled_error
    ) -> Callable[[Tensor], float]:
        """Return the check against the same call in float64."""
        return lambda found: error(found, call(self.double())())


class ClippedTask(Task):
    """The same in training mode, with a label for every sample and the norm to clip to."""

    max_norm = 1.0

    def __init__(self, network: Network, batch: int, device: str) -> None:
        super().__init__(network, batch, device, LABELS)
        self.model.train()

    def distance(self, gradients: Iterable[Tensor]) -> float:
        """Return the relative distance from the sum of a float64 loop's clipped gradients."""
        return float((flat(gradients).double() - self.exact).norm() / self.exact.norm())

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
        for gradient in map(flat, map(task.gradient, range(len(task.x)))):
            total = total + min(1.0, self.max_norm / float(gradient.norm())) * gradient
        found: Tensor = total
        return found


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def sqnorms(gradients: Iterable[Tensor]) -> Tensor:
    return torch.stack([g.square().sum() for g in gradients])


def norm_error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest error relative to the norm plus 1e-12 of the sum of all norms."""
    return float(((found.double() - wanted).abs() / (wanted + 1e-12 * wanted.sum())).max())


def middle_error(found: Tensor, wanted: Tensor) -> float:
    """Return the median of the samples' errors: at the kink of a ReLU, rounding gives another gradient."""
    return statistics.median(map(scaled_error, found, wanted))
