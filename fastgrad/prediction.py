"""The answer of a two-stage model, whether it runs in Python or from an exported file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """Logits, how likely each class is, how unusual the input is, how likely the answer is wrong, and whether to look.

    Attributes:
        logits: ``(B, N)``, the network's own.
        probabilities: ``(B, N)``: how likely each class is. The softmax, with a temperature if fitted with labels. With
            a correction ``(1 - g) p_network + g p_corrected``, where ``g`` is the probability that the input is a
            challenge.
        uncertainty: ``(B,)``: how atypical the input is; higher is less reliable. It is -log of the probability that a
            clean input looks at least this unusual, not a probability of error. Infinite where it cannot be computed.
        risk: ``(B,)``: the probability that the answer is wrong, for clean and unusual inputs; None if fitted without
            labels.
        flagged: ``(B,)`` of bool: whether the uncertainty is above the threshold of a false-alarm rate,
            `TwoStageModel.false_alarm_rate` or that of an exported file; None if a file has none.
    """

    logits: Tensor
    probabilities: Tensor
    uncertainty: Tensor
    risk: Tensor | None = None
    flagged: Tensor | None = None
