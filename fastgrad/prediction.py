"""What a two-stage model answers, live or from a file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """Three answers to three questions: what it is, how unusual the input is, and whether the answer is wrong.

    Attributes:
        logits: ``(B, N)``, the network's own.
        probabilities: ``(B, N)``: how likely each class is. Without an introspective classifier the softmax, with a
            temperature where labels gave one; with one ``(1 - g) p_network + g p_classifier``, where ``g`` is the
            probability that the input is a challenge and not clean.
        uncertainty: ``(B,)``: how atypical the input is; higher is less reliable. It is -log of the probability that
            a clean input looks at least so unusual, infinite where it cannot be computed, and no probability of error.
        risk: ``(B,)``: the probability that the answer is wrong, for clean and for unusual inputs; None where the model
            was fitted without labels.
    """

    logits: Tensor
    probabilities: Tensor
    uncertainty: Tensor
    risk: Tensor | None = None
