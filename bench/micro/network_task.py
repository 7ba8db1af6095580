"""A network, a batch and a loss, and how far norms may be from float64."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.registry import scaled_error

OURS, PEERS = 1e-4, 1e-3


def bce_ones(logits: Tensor) -> Tensor:
    """Binary cross-entropy with the label 1 for every class, summed over samples and classes."""
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="sum")


def ce_predicted(logits: Tensor) -> Tensor:
    """Cross-entropy with the predicted class as label, summed over samples."""
    return F.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")


SIGNALS = {"bce ones": bce_ones, "cross_entropy predicted": ce_predicted}


class Task:
    """A network, a batch and a loss; models and inputs are seeded."""

    def __init__(
        self, build: Callable[[], nn.Module], inputs: Callable[[torch.Generator], Tensor], signal: str,
        device: str, seed: int, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.model = build().eval().to(device)
        made = torch.Generator().manual_seed(seed)
        x = inputs(made)
        self.dtype = dtype
        self.model.to(dtype)
        self.x = (x.to(dtype) if x.is_floating_point() else x).to(device)
        self.signal, self.loss = signal, SIGNALS[signal]
        self.wanted: dict[int, Tensor] = {}

    def double(self) -> tuple[nn.Module, Tensor]:
        """The network and the batch in float64."""
        x = self.x.double() if self.x.is_floating_point() else self.x
        return copy.deepcopy(self.model).double(), x

    def error(self, norms: Tensor) -> float:
        """Relative error of ``(B, P)`` on the first and last sample."""
        if not self.wanted:
            model, x = self.double()
            for b in (0, len(x) - 1):
                grads = torch.autograd.grad(self.loss(model(x[b : b + 1])), list(model.parameters()))
                self.wanted[b] = torch.stack([g.square().sum() for g in grads])
        worst = max(error(norms[b], wanted) for b, wanted in self.wanted.items())
        return worst if bool(torch.isfinite(norms).all()) else float("inf")

    def forward_error(self, logits: Tensor) -> float:
        """Error of the logits."""
        model, x = self.double()
        with torch.no_grad():
            return scaled_error(logits, model(x))

    def data_error(self, gradient: Tensor) -> float:
        """Error of the gradient at the images, or of the embedding's.

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
        """Error of the last bias's gradient for the whole batch, which needs only a float64 forward pass."""
        model, x = self.double()
        with torch.no_grad():
            z = model(x)
        z.requires_grad_()
        (delta,) = torch.autograd.grad(self.loss(z), z)
        return scaled_error(gradient, delta.sum(0))


def first_leaf(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input, and where a backward pass without parameters ends: at images, or the embedding of tokens."""
    if x.is_floating_point():
        x = x.detach().requires_grad_()
        return x, x
    return x, next(model.parameters()).requires_grad_()


def error(found: Tensor, wanted: Tensor) -> float:
    floor = 1e-12 * wanted.sum()
    return float(((found.double() - wanted).abs() / (wanted + floor)).max())
