"""From the model's outputs to an answer in plain values, the same for a request and for a row of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastgrad.deploy.file.package import Description, ModelPackage

#: Share of all evidence that the parts named as the reason hold.
_MOST = 2 / 3


class ResultError(ValueError):
    """The model's result is not finite: the input lies outside what its arithmetic can hold."""


def results(model: ModelPackage, batch: Tensor) -> list[np.ndarray[Any, Any]]:
    """What the answers to a batch ``(B, *input_shape)`` need, ``(B, ...)`` each, in the order of `answer`."""
    prediction, evidence = model.explain(batch)
    needed = (prediction.probabilities, prediction.uncertainty, *evidence.values())
    return [value.cpu().numpy() for value in needed]


def answer(
    description: Description,
    threshold: float | None,
    probabilities: np.ndarray[Any, Any],
    uncertainty: float,
    *evidence: float,
) -> dict[str, Any]:
    """The answer to one input.

    Returns:
        ``class`` (index), ``label`` (its name, or None), ``probabilities`` (N), ``uncertainty``, ``reliable``: whether
        the uncertainty is at most the threshold (None without one), ``evidence``: by name, what the uncertainty rests
        on (None if the file does not give it), and ``alarm``: in words, what the most of it means (`reason`) where the
        answer is not reliable, else None.

    Raises:
        ResultError: The result is not finite.
    """
    if not (math.isfinite(uncertainty) and np.isfinite([*probabilities, *evidence]).all()):
        raise ResultError("the model's result for this input is not a finite number")
    index = int(probabilities.argmax())
    reliable = None if threshold is None else float(uncertainty) <= threshold
    words = description.evidence
    named = dict(zip(words, map(float, evidence), strict=True)) if words else None
    return {
        "class": index,
        "label": description.labels[index] if description.labels else None,
        "probabilities": [float(value) for value in probabilities],
        "uncertainty": float(uncertainty),
        "reliable": reliable,
        "evidence": named,
        "alarm": reason(words, named) if words and named and reliable is False else None,
    }


def reason(words: Mapping[str, str], evidence: Mapping[str, float]) -> str | None:
    """The words of the fewest parts that hold two thirds of the evidence, the strongest first; None without any."""
    enough, held, found = _MOST * sum(evidence.values()), 0.0, []
    for name, value in sorted(evidence.items(), key=lambda part: -part[1]):
        if held >= enough:
            break
        held += value
        found.append(words[name])
    return "; ".join(found) or None
