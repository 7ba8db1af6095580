"""H, the introspective network: a perceptron over contrast rows that are never written out."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from fastgrad.scores.fitted import Fitted

ACTIVATIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu, "tanh": torch.tanh}
# Glorot's initial scale assumes a slope of one at zero; the sigmoid's is a quarter (Glorot and Bengio, 2010).
GAINS = {"sigmoid": 4.0, "relu": math.sqrt(2.0), "tanh": 5 / 3}


class IntrospectiveNetwork(Fitted):
    """Class logits from introspective rows, given as such or as the features and logits that make them.

    Tensors ``weight0``, ``bias0``, ``weight1``, ... are the layers. The rows' standardisation is folded into
    the first one, so that it can run through `fastgrad.contrast_rows_linear`. Options: ``layers``,
    ``activation``, ``loss`` (of the rows).
    """

    def forward(self, rows: Tensor) -> Tensor:
        """Class logits ``(B, classes)`` of ``rows`` ``(B, N*D)`` or ``(B, N, D)``, in the rows' dtype."""
        return self._rest(layer(rows.flatten(1), self.weight(0, rows), self.bias(0, rows)))

    def from_features(self, features: Tensor, logits: Tensor) -> Tensor:
        """Class logits ``(B, classes)`` of the rows of ``features`` ``(B, D)`` and ``logits`` ``(B, N)``."""
        first = first_layer(features, logits, self.weight(0, features), self.bias(0, features), self.options["loss"])
        return self._rest(first)

    def answer(self, features: Tensor, logits: Tensor) -> Tensor:
        """Class logits from ``features`` alone where it was fitted on them, else from the rows."""
        alone = self.get_buffer("weight0").shape[1] == features.shape[-1]
        result: Tensor = self(features) if alone else self.from_features(features, logits)
        return result

    def _rest(self, hidden: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.options["activation"]]
        for index in range(1, self.options["layers"]):
            hidden = layer(activation(hidden), self.weight(index, hidden), self.bias(index, hidden))
        return hidden

    def weight(self, index: int, like: Tensor) -> Tensor:
        """Layer ``index``'s weight in the dtype of ``like``."""
        return self.get_buffer(f"weight{index}").to(like.dtype)

    def bias(self, index: int, like: Tensor) -> Tensor:
        """Layer ``index``'s bias in the dtype of ``like``."""
        return self.get_buffer(f"bias{index}").to(like.dtype)


def layer(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One linear layer."""
    return torch.nn.functional.linear(rows, weight, bias)


def first_layer(features: Tensor, logits: Tensor, weight: Tensor, bias: Tensor, loss: str) -> Tensor:
    """The first layer over the contrast rows of ``features`` and ``logits``, which are never stored."""
    from fastgrad.gradients.contrasts import contrast_rows_linear

    result: Tensor = contrast_rows_linear(features, logits, weight, bias, loss=loss)
    return result


def new_layers(sizes: list[int], activation: str, seed: int) -> list[Tensor]:
    """Weights and biases in turn for layers of the given sizes, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    parameters: list[Tensor] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        gain = GAINS[activation] if index > 0 else 1.0
        bound = gain * math.sqrt(6 / (inputs + outputs))
        parameters.append((torch.rand(outputs, inputs, generator=generator) * 2 - 1) * bound)
        parameters.append(torch.zeros(outputs))
    return parameters


class RowMoments:
    """Streaming mean and standard deviation of the rows, without forming them for pairs.

    The row entry of class k and feature j is d_k h_j, so over a batch its sum is (d^T h)[k, j] and the sum of
    its squares (d*d)^T (h*h).
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    def add_rows(self, rows: Tensor) -> None:
        """A batch of rows ``(B, F)``."""
        rows = rows.double()
        self._add(len(rows), rows.sum(0), rows.square().sum(0))

    def add_pairs(self, features: Tensor, logits: Tensor, loss: str) -> None:
        """A batch of ``features`` ``(B, D)`` and ``logits`` ``(B, N)``."""
        from fastgrad.losses import contrast_diagonal

        h, d = features.double(), contrast_diagonal(logits.double(), loss=loss)
        self._add(len(h), (d.T @ h).flatten(), (d.square().T @ h.square()).flatten())

    def _add(self, count: int, total: Tensor, squares: Tensor) -> None:
        self.count += count
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``(F,)``, the latter 1 where the column is constant."""
        if self.total is None or self.squares is None:
            raise ValueError("the training data must not be empty; it had 0 samples")
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        # Below this the two terms agree to every digit that float64 holds.
        constant = variance <= 1e-12 * (mean.square() + 1e-300)
        return mean, torch.where(constant, torch.ones_like(variance), variance.sqrt())
