"""Training of the introspective network: Adam, early stopping, a progress bar, seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgrad.checks import extra
from fastgrad.introspection.network import ACTIVATIONS, first_layer, layer

# What a batch holds: rows alone, or features and logits.
Inputs = tuple[Tensor, ...]
Batches = Callable[[], Iterable[tuple[Inputs, Tensor]]]


@dataclass
class Trainer:
    """Fits the parameters of an introspective network to batches.

    Attributes:
        parameters: Weights and biases in turn, over standardised rows; updated in place.
        mean: ``(F,)`` of the rows.
        scale: ``(F,)`` of the rows.
    """

    parameters: list[Tensor]
    mean: Tensor
    scale: Tensor
    activation: str
    loss: str
    learning_rate: float
    weight_decay: float
    max_epochs: int
    patience: int
    device: torch.device
    verbose: bool

    def folded(self) -> list[Tensor]:
        """The parameters with the standardisation inside the first layer."""
        weight = self.parameters[0] / self.scale
        return [weight, self.parameters[1] - weight @ self.mean, *self.parameters[2:]]

    def logits(self, inputs: Inputs) -> Tensor:
        """Class logits ``(B, classes)`` of a batch."""
        parameters = self.folded()
        if len(inputs) == 1:
            hidden = layer(inputs[0], parameters[0], parameters[1])
        else:
            hidden = first_layer(inputs[0], inputs[1], parameters[0], parameters[1], self.loss)
        for index in range(2, len(parameters), 2):
            hidden = layer(ACTIVATIONS[self.activation](hidden), parameters[index], parameters[index + 1])
        return hidden

    def run(self, training: Batches, validation: Batches | None) -> list[float]:
        """Train, keep the best parameters, and return the watched loss of every epoch.

        The watched loss is that of ``validation`` where there is one, else the training loss itself.
        """
        self.mean = self.mean.float().to(self.device)
        self.scale = self.scale.float().to(self.device)
        self.parameters = [value.to(self.device).requires_grad_() for value in self.parameters]
        optimizer = torch.optim.AdamW(self.parameters, self.learning_rate, weight_decay=self.weight_decay)
        best, best_loss, waited = self._snapshot(), float("inf"), 0
        history: list[float] = []
        bar = _bar(self.max_epochs, self.verbose)
        try:
            for _ in range(self.max_epochs):
                watched = self._epoch(training, optimizer)
                if validation is not None:
                    watched = self._evaluate(validation)
                history.append(watched)
                if bar is not None:
                    bar.update()
                    bar.set_postfix(loss=f"{watched:.4f}")
                if watched < best_loss - 1e-4 * abs(best_loss if best_loss < float("inf") else 0.0):
                    best, best_loss, waited = self._snapshot(), watched, 0
                else:
                    waited += 1
                    if waited >= self.patience:
                        break
        finally:
            if bar is not None:
                bar.close()
        self.parameters = best
        self.mean, self.scale = self.mean.cpu(), self.scale.cpu()
        return history

    def _snapshot(self) -> list[Tensor]:
        return [copy.deepcopy(value.detach()).cpu() for value in self.parameters]

    def _epoch(self, batches: Batches, optimizer: torch.optim.Optimizer) -> float:
        total, count = 0.0, 0
        for inputs, labels in batches():
            labels = labels.to(self.device)
            loss = F.cross_entropy(self.logits(self._move(inputs)), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, count = total + float(loss.detach()) * len(labels), count + len(labels)
        return total / max(1, count)

    @torch.no_grad()
    def _evaluate(self, batches: Batches) -> float:
        total, count = 0.0, 0
        for inputs, labels in batches():
            labels = labels.to(self.device)
            total += float(F.cross_entropy(self.logits(self._move(inputs)), labels, reduction="sum"))
            count += len(labels)
        return total / max(1, count)

    def _move(self, inputs: Inputs) -> Inputs:
        return tuple(value.to(self.device, torch.float32) for value in inputs)


def _bar(total: int, verbose: bool):  # type: ignore[no-untyped-def]
    if not verbose:
        return None
    with extra("demo"):
        from tqdm.auto import tqdm

    return tqdm(total=total, desc="introspective network", unit="epoch")
