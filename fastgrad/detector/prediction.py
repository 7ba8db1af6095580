"""What a two-stage model answers, live or from a file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """Two answers to two questions: how likely the prediction is right, and how unusual the input is.

    Attributes:
        logits: ``(B, N)``, the network's own.
        probabilities: ``(B, N)``: how likely each class is, for inputs like those the model was fitted on; of the
            introspective classifier where there is one, else the softmax, with a temperature where labels gave one.
        uncertainty: ``(B,)``: how atypical the input is; higher is less reliable. It is -log of the probability that
            a clean input looks at least so unusual, infinite where it cannot be computed, and no probability of error.
    """

    logits: Tensor
    probabilities: Tensor
    uncertainty: Tensor
