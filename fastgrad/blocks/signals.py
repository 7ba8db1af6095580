"""What is sent back through a network: gradients of losses at its logits, in closed form, or of a logit itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad import losses


@dataclass(frozen=True)
class Signal:
    """One gradient at the logits.

    Attributes:
        name: What it is called in reports and files.
        delta: ``logits (B, N) -> (B, N)``.
    """

    name: str
    delta: Callable[[Tensor], Tensor]


def of_loss(loss: str, target: str) -> Signal:
    """The gradient of ``loss`` against a fixed ``target``."""
    return Signal(f"{loss}-{target}", lambda logits: losses.delta(logits, target, loss=loss))


def class_of_rank(logits: Tensor, rank: int) -> Tensor:
    """The class of the given rank, 0 for the predicted one: ``(B, N)`` to ``(B,)``."""
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, rank]


def of_rank(rank: int) -> Signal:
    """The gradient of cross-entropy against the class of the given rank."""

    def delta(logits: Tensor) -> Tensor:
        return losses.delta(logits, class_of_rank(logits, rank), loss="cross_entropy")

    return Signal(f"cross_entropy-rank{rank}", delta)


def _predicted(logits: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)


#: The predicted logit itself, whatever its probability: a gradient that does not vanish with confidence.
PREDICTED_LOGIT = Signal("predicted logit", _predicted)
#: Three losses whose gradients say different things about a sample.
JOINED = (
    of_loss("bce", "ones"),
    of_loss("cross_entropy", "ones"),
    of_loss("cross_entropy", "predicted"),
)
