"""Small networks of parts and a function, and the norms of ``record`` held against the float64 loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gradient_oracle import loss_norms, relative_error
from torch import Tensor, nn

import fastgrad
from fastgrad.layers import register_rule


class Net(nn.Module):
    """A network with the attributes ``parts``, that gives ``function(network, *inputs)``."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


class Misjudged(nn.Linear):
    """A layer whose rule disagrees with autograd, so that the model as a whole is computed again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@register_rule(Misjudged, name="misjudged")
def misjudged(_: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    return dict.fromkeys(("weight", "bias"), 1 + g.square().sum(1))


def recorded(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """``(B, P)``: squared norms of all parameters from ``record``, for a loss that is computed inside."""
    with fastgrad.record(model):
        return torch.stack(fastgrad.grad_sqnorm(loss(), list(model.parameters())), 1)


def assert_exact(found: Tensor, truth: Tensor) -> None:
    """Compare norms ``(B, P)`` in float64."""
    assert found.shape == truth.shape
    assert relative_error(found, truth, 2e-16).max() < 1e-10


def check_losses(model: nn.Module, losses: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compare ``record`` for the losses ``(B,)`` of a batch, or their sum, with the losses of each sample alone."""
    truth = loss_norms((losses(row).sum() for row in x.split(1)), model)
    assert_exact(recorded(model, lambda: losses(x).sum()), truth)
