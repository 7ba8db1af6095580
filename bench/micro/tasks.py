"""A seeded network and a batch, and how far an implementation's result may be from float64."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence

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

    def double(self) -> tuple[nn.Module, Tensor]:
        """Return the network and the batch in float64."""
        return copy.deepcopy(self.model).double(), self.x.double() if self.x.is_floating_point() else self.x

    def error(self, norms: Tensor) -> float:
        """Return the relative error of ``(B, P)`` on the first and last sample."""
        if not self._wanted:
            model, x = self.double()
            for b in (0, len(x) - 1):
                self._wanted[b] = sqnorms(self.loss(model(x[b : b + 1])), model)
        worst = max(error(norms[b], wanted) for b, wanted in self._wanted.items())
        return worst if bool(torch.isfinite(norms).all()) else float("inf")

    def forward_error(self, logits: Tensor) -> float:
        """Return the error of the logits."""
        model, x = self.double()
        with torch.no_grad():
            return scaled_error(logits, model(x))

    def data_error(self, gradient: Tensor) -> float:
        """Return the error of the gradient at the images, or of the embedding's.

        Of the samples' errors the middle one: where a rectifier lies within rounding of its corner, a sample's gradient
        is another.
        """
        model, x = self.double()
        x, leaf = first_leaf(model.requires_grad_(False), x)
        wanted = torch.autograd.grad(self.loss(model(x)), leaf)[0]
        if leaf is not x:
            return scaled_error(gradient, wanted)
        return statistics.median(scaled_error(*pair) for pair in zip(gradient, wanted, strict=True))

    def bias_error(self, gradient: Tensor) -> float:
        """Return the error of the last bias's gradient for the batch, which needs only a float64 forward pass."""
        model, x = self.double()
        with torch.no_grad():
            z = model(x)
        z.requires_grad_()
        (delta,) = torch.autograd.grad(self.loss(z), z)
        return scaled_error(gradient, delta.sum(0))


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
        model, inputs = self.double()
        parameters = list(model.parameters())
        wanted = [torch.zeros_like(p) for p in parameters]
        for x, y in zip(inputs, self.y, strict=True):
            found = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)
            norm = float(torch.stack([g.square().sum() for g in found]).sum().sqrt())
            for total, g in zip(wanted, found, strict=True):
                total += min(1.0, limit / norm) * g
        pairs = list(zip(gradients, wanted, strict=True))
        off = torch.stack([(g.double() - w).square().sum() for g, w in pairs]).sum()
        return float((off / torch.stack([w.square().sum() for w in wanted]).sum()).sqrt())


def first_leaf(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input, and where a backward pass without parameters ends: at images, or the embedding of tokens."""
    if x.is_floating_point():
        x = x.detach().requires_grad_()
        return x, x
    return x, next(model.parameters()).requires_grad_()


def sqnorms(loss: Tensor, model: nn.Module) -> Tensor:
    """Return the squared gradient norm of every parameter."""
    return torch.stack([g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))])


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the relative error, or that relative to a millionth of a millionth of the sum."""
    return float(((found.double() - wanted).abs() / (wanted + 1e-12 * wanted.sum())).max())
