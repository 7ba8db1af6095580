"""Training of the introspective network: Adam, early stopping, a progress bar, seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgrad.batches import bar
from fastgrad.introspection.network import Inputs, class_logits

Batches = Callable[[], Iterable[tuple[Inputs, Tensor]]]


def train(
    parameters: list[Tensor],
    mean: Tensor,
    scale: Tensor,
    training: Batches,
    validation: Batches | None,
    *,
    activation: str,
    loss: str,
    learning_rate: float,
    weight_decay: float,
    max_epochs: int,
    patience: int,
    device: torch.device,
    verbose: bool,
) -> tuple[list[Tensor], list[float]]:
    """Fit ``parameters``, weights and biases in turn, over rows standardised by ``mean`` and ``scale`` ``(F,)``.

    Returns:
        The parameters of the best epoch, the standardisation inside the first layer, and the watched loss of every
        epoch: that of ``validation`` where there is one, else the training loss itself.
    """
    mean, scale = mean.float(), scale.float()
    there = mean.to(device), scale.to(device)
    parameters = [value.to(device).requires_grad_() for value in parameters]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay)

    def batch_loss(inputs: Inputs, labels: Tensor, reduction: str) -> Tensor:
        moved = tuple(value.to(device, torch.float32) for value in inputs)
        logits = class_logits(_folded(parameters, *there), moved, activation, loss)
        return F.cross_entropy(logits, labels.to(device), reduction=reduction)

    def epoch() -> float:
        total, count = 0.0, 0
        for inputs, labels in training():
            value = batch_loss(inputs, labels, "mean")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total, count = total + float(value.detach()) * len(labels), count + len(labels)
        return total / count

    @torch.no_grad()
    def evaluated(batches: Batches) -> float:
        total, count = 0.0, 0
        for inputs, labels in batches():
            total, count = total + float(batch_loss(inputs, labels, "sum")), count + len(labels)
        return total / count

    def snapshot() -> list[Tensor]:
        return [value.detach().cpu().clone() for value in parameters]

    best, best_loss, waited = snapshot(), float("inf"), 0
    history: list[float] = []
    epochs: Any = bar(range(max_epochs), "introspective network", verbose, unit="epoch")
    for _ in epochs:
        watched = epoch()
        if validation is not None:
            watched = evaluated(validation)
        history.append(watched)
        if verbose:
            epochs.set_postfix(loss=f"{watched:.4f}")
        if watched < best_loss - 1e-4 * abs(best_loss if best_loss < float("inf") else 0.0):
            best, best_loss, waited = snapshot(), watched, 0
        else:
            waited += 1
            if waited >= patience:
                break
    return _folded(best, mean, scale), history


def _folded(parameters: list[Tensor], mean: Tensor, scale: Tensor) -> list[Tensor]:
    """The parameters with the standardisation inside the first layer."""
    weight = parameters[0] / scale
    return [weight, parameters[1] - weight @ mean, *parameters[2:]]
