"""Turn the model's outputs into an answer of plain values, the same for a request and a row of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastgrad.checks import Array
from fastgrad.deploy.file.description import Description

#: Share of all evidence that the reason must cover.
_MOST = 2 / 3


class ResultError(ValueError):
    """The model's result is not finite: its arithmetic cannot represent the result for this input."""


def answer(description: Description, threshold: float | None, row: Array) -> dict[str, Any]:
    """Return the answer to one input from its row of `ModelPackage.rows` and the threshold in use.

    Fields that the file does not give are None. ResultError if the row is not finite.
    """
    if not np.isfinite(row).all():
        raise ResultError("the model's result for this input is not a finite number")
    probabilities, (uncertainty, *more) = row[: description.classes], row[description.classes :].tolist()
    risk = more.pop(0) if description.risk else None
    limit = description.risk_threshold
    index = int(probabilities.argmax())
    reliable = None if threshold is None else uncertainty <= threshold
    words = description.evidence
    evidence = dict(zip(words, more, strict=True)) if words else None
    return {
        "class": index,
        "label": description.labels[index] if description.labels else None,
        "probabilities": probabilities.tolist(),
        "uncertainty": uncertainty,
        "risk": risk,
        "reliable": reliable,
        "accepted": None if risk is None or limit is None else risk <= limit,
        "evidence": evidence,
        "alarm": reason(words, evidence) if words and evidence and reliable is False else None,
    }


def reason(words: Mapping[str, str], evidence: Mapping[str, float]) -> str | None:
    """Return the words of the fewest parts with two thirds of the evidence, strongest first; None without evidence."""
    enough, covered, named = _MOST * sum(evidence.values()), 0.0, []
    for name, value in sorted(evidence.items(), key=lambda part: -part[1]):
        if covered >= enough:
            break
        covered += value
        named.append(words[name])
    return "; ".join(named) or None
