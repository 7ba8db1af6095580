"""The description stored with an exported graph, and the checks of its fields, because a file can claim anything."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgrad.checks import FLOAT_DTYPES, fits_utf8, is_number
from fastgrad.deploy.drift import ScoreReference

#: Version of the description's format.
FORMAT = 1
#: Dtypes of an input, by name.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


@dataclass(frozen=True)
class Description:
    """The description stored with an exported graph.

    Attributes:
        input_shape: Shape of one input, without the batch.
        input_dtype: A key of `DTYPES`.
        classes: N.
        max_batch: Largest batch that the graph was exported for.
        device: Type of the device it was compiled for, ``"cpu"`` or ``"cuda"``.
        labels: N names, or None.
        mean, std: Per channel, for pixels from 0 to 1; the input is ``(pixel - mean) / std``.
        false_alarm_rate: The rate of ``threshold``.
        threshold: An input is unreliable if its uncertainty exceeds it; None without calibration.
        thresholds: Pairs of rate and threshold, including the file's own.
        histogram: In-distribution scores in bins of equal width, ``{"edges": (K+1), "counts": (K)}``, or None.
        reference: The same scores for the drift monitor, ``{"edges": (K-1), "counts": (K)}``, or None.
        versions: Those of fastgrad and torch, and the instruction set and operating system of compiled code.
        evidence: Name of each column of evidence and what its alarm means, in words; None without evidence.
        risk: Whether the file gives the probability that an answer is wrong.
        risk_threshold: An answer is accepted if its risk is at most this; None if nothing was decided.
        wrong_above: The risk above which as many answers to clean inputs are as were wrong, for
            `fastgrad.deploy.error_rate`; None if the risk was fitted without challenges.

    Raises:
        ValueError: A field is not as above; the message names it.
    """

    input_shape: tuple[int, ...]
    input_dtype: str
    classes: int
    max_batch: int
    device: str
    labels: list[str] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    false_alarm_rate: float | None = None
    threshold: float | None = None
    thresholds: list[tuple[float, float]] = field(default_factory=list)
    histogram: dict[str, list[float]] | None = None
    reference: dict[str, list[float]] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, str] | None = None
    risk: bool = False
    risk_threshold: float | None = None
    wrong_above: float | None = None

    def __post_init__(self) -> None:
        for name, (fits, expected) in _FIELDS.items():
            value = getattr(self, name)
            optional = type(self).__dataclass_fields__[name].default is None
            try:
                good = (optional and value is None) or fits(self, value)
            except (TypeError, ValueError, KeyError, OverflowError, AttributeError):
                good = False
            if not good:
                expected = "None or " * optional + expected.format(classes=self.classes, shape=self.input_shape)
                raise ValueError(f"{name} must be {expected}; it was {repr(value)[:80]}")

    @property
    def columns(self) -> int:
        """Numbers in a row of `ModelPackage.rows`."""
        return sum(map(math.prod, outputs_of(self).values())) - self.classes

    def threshold_at(self, rate: float | None) -> float | None:
        """Return the threshold at one of the file's false-alarm rates; None stands for the file's own.

        Raises:
            TypeError, ValueError: The rate is not a number, or the file has no threshold for it.
        """
        if rate is None:
            return self.threshold
        is_number(false_alarm_rate=rate)
        for known, threshold in self.thresholds:
            if abs(known - rate) < 1e-12:
                return threshold
        known_rates = ", ".join(f"{known:g}" for known, _ in self.thresholds) or "none"
        raise ValueError(
            f"false_alarm_rate must be one for which the file holds a threshold ({known_rates}); it was {rate!r}"
        )

    def score_reference(self) -> ScoreReference | None:
        """Return the in-distribution scores for a `DriftMonitor`, or None."""
        return None if self.reference is None else ScoreReference(**self.reference)  # type: ignore[arg-type]

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return ``(pixel - mean) / std`` for pixels ``(..., C, H, W)`` from 0 to 1; a missing step is skipped."""
        for apply, values in ((torch.sub, self.mean), (torch.div, self.std)):
            if values is not None:
                pixels = apply(pixels, torch.tensor(values, dtype=pixels.dtype, device="cpu").view(-1, 1, 1))
        return pixels


def outputs_of(description: Description) -> dict[str, tuple[int, ...]]:
    """Return the graph's outputs in order: name, and shape for one input."""
    classes, evidence = (description.classes,), description.evidence
    return {
        "logits": classes, "probabilities": classes, "uncertainty": (),
        **({"risk": ()} if description.risk else {}), **({"evidence": (len(evidence),)} if evidence else {}),
    }  # fmt: skip


def normalize_pixels(description: Description, pixels: Tensor) -> Tensor:
    """Return the network's input for pixels ``(..., C, H, W)`` from 0 to 255."""
    dtype = DTYPES[description.input_dtype]
    # At least in float32, like the pixels in training: in bfloat16 each step could change a pixel by a level.
    return description.normalize(pixels.to(torch.promote_types(dtype, torch.float32)) / 255).to(dtype)


def _count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: Any, length: int | None = None) -> bool:
    """Whether this is a list of finite numbers, of this length if given."""
    return (
        isinstance(values, list)
        and len(values) <= 65_536
        and (length is None or len(values) == length)
        and all(_number(value) for value in values)
    )


def _words(values: Any, most: int) -> bool:
    """Whether these are at most ``most`` texts that UTF-8 can encode."""
    return len(values) <= most and all(
        isinstance(value, str) and len(value) <= 1000 and fits_utf8(value) for value in values
    )


def _mapping(value: Any) -> bool:
    return isinstance(value, dict) and _words(value, 1000) and _words(value.values(), 1000)


def _channels(description: Description, values: Any) -> bool:
    return len(description.input_shape) == 3 and _numbers(values, description.input_shape[0])


def _rate(value: Any) -> bool:
    return _number(value) and 0 < value < 1


def _bins(value: Any, more: int) -> bool:
    """Whether this holds non-decreasing edges, and ``more`` more non-negative counts than edges."""
    edges, counts = value["edges"], value["counts"]
    return (
        set(value) == {"edges", "counts"}
        and _numbers(edges)
        and _numbers(counts, len(edges) + more)
        and all(a <= b for a, b in itertools.pairwise(edges))
        and min(counts) >= 0
    )


#: The check of each field that is not None, and what it requires; a check may rely on the fields before it.
_FIELDS: dict[str, tuple[Callable[[Description, Any], bool], str]] = {
    "input_shape": (
        lambda _, v: isinstance(v, tuple) and 1 <= len(v) <= 8 and all(_count(n, 2**20) for n in v)
        and math.prod(v) <= 2**28, "1 to 8 positive integers, at most 2**28 numbers in all"),
    "input_dtype": (lambda _, v: isinstance(v, str) and v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "classes": (lambda _, v: _count(v, 2**20), "an integer from 1 to 2**20"),
    "max_batch": (lambda _, v: _count(v, 2**20), "an integer from 1 to 2**20"),
    "device": (lambda _, v: v in ("cpu", "cuda"), "cpu or cuda"),
    "labels": (lambda d, v: isinstance(v, list) and len(v) == d.classes and _words(v, 2**20),
               "{classes} names, one a class, in UTF-8"),
    "mean": (_channels, "a finite number a channel of images {shape}"),
    "std": (lambda d, v: _channels(d, v) and min(v) > 0, "a positive number a channel of images {shape}"),
    "false_alarm_rate": (lambda _, v: _rate(v), "a number between 0 and 1"),
    "threshold": (lambda _, v: _number(v), "a finite number"),
    "thresholds": (lambda _, v: isinstance(v, list) and len(v) <= 1000
                   and all(_rate(rate) and _number(value) for rate, value in v),
                   "pairs of a rate between 0 and 1 and a finite number"),
    "histogram": (lambda _, v: _bins(v, -1), "increasing edges and a count between each two"),
    "reference": (lambda d, v: _bins(v, 1) and d.score_reference() is not None, "increasing edges and one count more"),
    "versions": (lambda _, v: _mapping(v), "names and versions"),
    "evidence": (lambda _, v: bool(v) and _mapping(v), "names and what an alarm of them means"),
    "risk": (lambda _, v: isinstance(v, bool), "true or false"),
    "risk_threshold": (lambda d, v: d.risk and _number(v) and 0 <= v <= 1, "a number from 0 to 1, in a file with risk"),
    "wrong_above": (lambda d, v: d.risk and _number(v) and 0 <= v <= 1, "a number from 0 to 1, in a file with risk"),
}  # fmt: skip


def description_text(description: Description) -> str:
    """Return the description as JSON, as it stands in the file."""
    return json.dumps({"format": FORMAT, **asdict(description)})
