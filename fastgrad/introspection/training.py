"""Training of the introspective network: AdamW, early stopping, a progress bar, seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fastgrad.batches import bar
from fastgrad.introspection.network import Inputs, class_logits, mean_and_scale, new_layers

if TYPE_CHECKING:
    from fastgrad.introspection.classifier import IntrospectiveClassifier


def train(
    given: IntrospectiveClassifier, inputs: Inputs, targets: Tensor, chosen: Tensor, watched: Tensor, seed: int
) -> tuple[list[Tensor], list[float]]:
    """Train on the samples ``chosen``, with the options of ``given``; those ``watched`` decide when to stop.

    Returns:
        Weights and biases in turn of the best epoch, the rows' standardisation inside the first layer, and the watched
        loss of every epoch: the training loss itself where no samples are watched.
    """
    device, generator = torch.device(given.device), Generator().manual_seed(seed)
    mean, scale = (value.float() for value in mean_and_scale(inputs, given.loss))
    there = mean.to(device), scale.to(device)
    sizes = [len(mean), *map(int, given.hidden), len(given.classes_)]
    parameters = [value.to(device).requires_grad_() for value in new_layers(sizes, given.activation, seed)]
    optimizer = torch.optim.AdamW(parameters, given.learning_rate, weight_decay=given.weight_decay)

    def batch_loss(samples: Tensor, reduction: str) -> Tensor:
        moved = tuple(value[samples].to(device, torch.float32) for value in inputs)
        logits = class_logits(_folded(parameters, *there), moved, given.activation, given.loss)
        return F.cross_entropy(logits, targets[samples].to(device), reduction=reduction)

    def epoch() -> float:
        total = 0.0
        for samples in chosen[torch.randperm(len(chosen), generator=generator, device="cpu")].split(given.batch_size):
            value = batch_loss(samples, "mean")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total += float(value.detach()) * len(samples)
        return total / len(chosen)

    @torch.no_grad()
    def held_out() -> float:
        return sum(float(batch_loss(samples, "sum")) for samples in watched.split(given.batch_size)) / len(watched)

    def snapshot() -> list[Tensor]:
        return [value.detach().cpu().clone() for value in parameters]

    best, best_loss, waited = snapshot(), float("inf"), 0
    history: list[float] = []
    epochs: Any = bar(range(given.max_epochs), "introspective network", bool(given.verbose), unit="epoch")
    for _ in epochs:
        loss = epoch()
        if len(watched):
            loss = held_out()
        history.append(loss)
        if given.verbose:
            epochs.set_postfix(loss=f"{loss:.4f}")
        if loss < best_loss * (1 - 1e-4):
            best, best_loss, waited = snapshot(), loss, 0
        else:
            waited += 1
            if waited >= given.patience:
                break
    if best_loss == float("inf"):
        raise ValueError(f"R must hold numbers that float32 can train on; the loss was never finite: {history[:3]}")
    return _folded(best, mean, scale), history


def _folded(parameters: list[Tensor], mean: Tensor, scale: Tensor) -> list[Tensor]:
    """The parameters with the standardisation inside the first layer."""
    weight = parameters[0] / scale
    return [weight, parameters[1] - weight @ mean, *parameters[2:]]
