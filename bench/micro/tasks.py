"""A seeded network and a batch, and how far an implementation's result may be from float64."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.micro.models import Network
from bench.registry import SEED, scaled_error

BCE, CE = "bce ones", "cross_entropy predicted"
#: What a plain product of float32 may lose, relative to its largest entry.
UNIT = 256 * torch.finfo(torch.float32).eps


class Task:
    """A network in evaluation mode, a batch, and the loss of a signal, `BCE` or `CE`."""

    def __init__(self, network: Network, batch: int, device: str, signal: str = BCE) -> None:
        build, inputs = network
        torch.manual_seed(SEED)
        self.model = build().eval().to(device)
        self.x = inputs(batch, torch.Generator().manual_seed(SEED)).to(device)
        self.signal = signal
        self._wanted: dict[int, Tensor] = {}

    def loss(self, logits: Tensor) -> Tensor:
        """Return the sum over samples."""
        if self.signal == BCE:
            return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="sum")
        return F.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")

    def double(self) -> Task:
        """Return the same in float64."""
        one = copy.copy(self)
        one.model = copy.deepcopy(self.model).double()
        one.x = self.x.double() if self.x.is_floating_point() else self.x
        return one

    def error(self, norms: Tensor) -> float:
        """Return the relative error of ``(B, P)`` on the first and last sample."""
        if not self._wanted:
            exact = self.double()
            for b in (0, len(exact.x) - 1):
                self._wanted[b] = sqnorms(exact.loss(exact.model(exact.x[b : b + 1])), exact.model)
        worst = max(error(norms[b], wanted) for b, wanted in self._wanted.items())
        return worst if bool(torch.isfinite(norms).all()) else float("inf")

    def against(self, call: Callable[[Task], Callable[[], Tensor]]) -> Callable[[Tensor], float]:
        """Return the check against the same call in float64."""
        return lambda found: scaled_error(found, call(self.double())())

    def sample_by_sample(self, call: Callable[[Task], Callable[[], Tensor]]) -> Callable[[Tensor], float]:
        """Return the check against the same call in float64, of the samples' errors the middle one.

        Where a rectifier lies within rounding of its corner, a sample's gradient is another.
        """
        return lambda found: statistics.median(map(scaled_error, found, call(self.double())()))


class ClippedTask(Task):
    """The same in training mode, with a label for every sample and the norm to clip to."""

    def __init__(self, network: Network, batch: int, device: str) -> None:
        super().__init__(network, batch, device)
        self.model.train()
        with torch.no_grad():
            classes = self.model(self.x[:1]).shape[1]
        self.y = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(SEED)).to(device)
        self.max_norm = 1.0

    def losses(self, model: nn.Module) -> Tensor:
        """``(B,)``."""
        return F.cross_entropy(model(self.x), self.y, reduction="none")

    def distance(self, gradients: Sequence[Tensor], limit: float = 1.0) -> float:
        """Return the distance from the sum of clipped gradients of a float64 loop, relative to its length.

        Args:
            gradients: All parameters'.
            limit: The norm to clip to; infinite for gradients as they are.
        """
        exact = self.double()
        model, parameters = exact.model, list(exact.model.parameters())
        wanted = [torch.zeros_like(p) for p in parameters]
        for x, y in zip(exact.x, self.y, strict=True):
            found = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)
            norm = float(torch.stack([g.square().sum() for g in found]).sum().sqrt())
            for total, g in zip(wanted, found, strict=True):
                total += min(1.0, limit / norm) * g
        pairs = list(zip(gradients, wanted, strict=True))
        off = torch.stack([(g.double() - w).square().sum() for g, w in pairs]).sum()
        return float((off / torch.stack([w.square().sum() for w in wanted]).sum()).sqrt())


def sqnorms(loss: Tensor, model: nn.Module) -> Tensor:
    """Return the squared gradient norm of every parameter."""
    return torch.stack([g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))])


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the relative error, or that relative to a millionth of a millionth of the sum."""
    return float(((found.double() - wanted).abs() / (wanted + 1e-12 * wanted.sum())).max())
