"""What is measured: cases, the implementations they compare, and what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Implementation:
    """One way to do a case's task.

    Attributes:
        name: As the table says it.
        prepare: Returns the call that is measured; what it does first (wrapping a model, compiling) is not.
        check: Says of the call's result whether it is right, as a relative error that must not exceed ``tolerance``.
        tolerance: Largest relative error; what is allowed and why is said where the case is made.
        graph: Whether the call can be captured in a CUDA graph.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    check: Callable[[Any], float]
    tolerance: float
    graph: bool = True


@dataclass
class Case:
    """One task at one size.

    Attributes:
        name: Task and sizes, e.g. ``contrasts B=256 N=1000 D=512 float32``.
        implementations: What is compared; called once, when the case runs, so that inputs exist only then.
        relative_to: The implementation that ratios refer to.
    """

    name: str
    implementations: Callable[[], list[Implementation]]
    relative_to: str


@dataclass
class Result:
    """What one implementation took in one case; times in seconds, None where it was not timed."""

    case: str
    implementation: str
    relative_to: str
    correct: bool
    error: float | None = None
    times: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    note: str = ""

    def quantile(self, q: float) -> float | None:
        """A quantile of the times."""
        return float(torch.tensor(self.times, dtype=torch.float64).quantile(q)) if self.times else None


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest elementwise relative error; infinite where shapes differ or a value is not finite."""
    return _worst(value, reference, reference.double().abs())


def scaled_error(value: Tensor, reference: Tensor) -> float:
    """Largest error relative to the largest magnitude in the reference: for sums that may cancel."""
    return _worst(value, reference, reference.double().abs().max())


def _worst(value: Tensor, reference: Tensor, scale: Tensor) -> float:
    if tuple(value.shape) != tuple(reference.shape):
        return float("inf")
    value = value.detach().to(reference.device).double()
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    tiny = torch.finfo(torch.float64).tiny
    return float(((value - reference.double()).abs() / scale.clamp_min(tiny)).max())
