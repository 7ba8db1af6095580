"""H, the introspective network: a perceptron over contrast rows, which are not stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastgrad.gradients.contrasts import contrast_rows_linear
from fastgrad.losses import contrast_diagonal
from fastgrad.ops.dispatch import full_precision
from fastgrad.scores.fitted import Fitted

#: What a network reads: rows alone, or features and logits.
Inputs = tuple[Tensor, ...]
ACTIVATIONS = {"sigmoid": torch.sigmoid, "relu": torch.relu, "tanh": torch.tanh}
# Glorot's initial scale assumes a slope of one at zero; the sigmoid's is a quarter (Glorot and Bengio, 2010).
GAINS = {"sigmoid": 4.0, "relu": math.sqrt(2.0), "tanh": 5 / 3}
#: Samples whose rows are read at a time.
CHUNK = 4096


class IntrospectiveNetwork(Fitted):
    """Class logits from introspective rows, given as such or as the features and logits that make them.

    Tensors ``weight0``, ``bias0``, ``weight1``, ... are the layers. The rows' standardisation is folded into
    the first one, so that it can run through `fastgrad.contrast_rows_linear`. Options: ``layers``,
    ``activation``, ``loss`` (of the rows).
    """

    def forward(self, rows: Tensor, logits: Tensor | None = None) -> Tensor:
        """Return class logits ``(B, classes)`` of ``rows`` ``(B, N*D)`` or ``(B, N, D)``, in the rows' dtype.

        With ``logits`` ``(B, N)``, the first argument is the features ``(B, D)`` from which the rows are made.
        """
        names = [f"{kind}{index}" for index in range(self.options["layers"]) for kind in ("weight", "bias")]
        parameters = [self.get_buffer(name).to(rows.dtype) for name in names]
        inputs = (rows.flatten(1),) if logits is None else (rows, logits)
        with full_precision(rows.device):
            return class_logits(parameters, inputs, self.options["activation"], self.options["loss"])


def class_logits(parameters: Sequence[Tensor], inputs: Inputs, activation: str, loss: str) -> Tensor:
    """Return class logits ``(B, classes)`` of rows ``(B, N*D)``, or of features and logits without storing rows.

    ``parameters`` are weights and biases in turn.
    """
    weight, bias, *others = parameters
    if len(inputs) == 1:
        hidden = linear(inputs[0], weight, bias)
    else:
        hidden = contrast_rows_linear(inputs[0], inputs[1], weight, bias, loss=loss)
    for weight, bias in zip(others[::2], others[1::2], strict=True):
        hidden = linear(ACTIVATIONS[activation](hidden), weight, bias)
    return hidden


def new_layers(sizes: list[int], activation: str, seed: int) -> list[Tensor]:
    """Return random weights and zero biases in turn for layers of the given sizes, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    parameters: list[Tensor] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        gain = GAINS[activation] if index > 0 else 1.0
        bound = gain * math.sqrt(6 / (inputs + outputs))
        weight = torch.rand(outputs, inputs, generator=generator, dtype=torch.float32, device="cpu")
        parameters += [(weight * 2 - 1) * bound, weight.new_zeros(outputs)]
    return parameters


def mean_and_scale(inputs: Inputs, loss: str) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``(F,)`` of the rows, the latter 1 for constant columns.

    Features and logits suffice, without rows: the entry of class k and feature j is d_k h_j. So over a batch its sum is
    (d^T h)[k, j], and the sum of its squares is this entry of (d*d)^T (h*h).
    """
    total = squares = torch.zeros(1, dtype=torch.float64, device="cpu")
    for rows, *logits in zip(*(torch.split(value.double(), CHUNK) for value in inputs), strict=True):
        if logits:
            d = contrast_diagonal(logits[0], loss=loss)
            total, squares = total + (d.T @ rows).flatten(), squares + (d.square().T @ rows.square()).flatten()
        else:
            total, squares = total + rows.sum(0), squares + rows.square().sum(0)
    mean = total / len(inputs[0])
    variance = (squares / len(inputs[0]) - mean.square()).clamp(min=0)
    # Below this the two terms agree to every digit that float64 holds.
    constant = variance <= 1e-12 * (mean.square() + 1e-300)
    return mean, torch.where(constant, torch.ones_like(variance), variance.sqrt())
