"""What `GradientFeatures`, `record` and `register_rule` refuse, with an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastgrad
from fastgrad.layers import register_rule

NET, X = nn.Linear(3, 4), torch.rand(5, 3)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "target": (lambda: fastgrad.GradientFeatures(NET, target=0.5), TypeError, "target must be .* 0.5"),  # type: ignore[arg-type]
    "log": (lambda: fastgrad.GradientFeatures(NET, log=1), TypeError, "log must be .* it was 1"),  # type: ignore[arg-type]
    "signals": (lambda: fastgrad.GradientFeatures(NET, signals=["bce"]), ValueError, "signals .* 'bce'"),  # type: ignore[list-item]
    "memory": (lambda: fastgrad.GradientFeatures(NET, memory_budget=1.5), ValueError, "memory_budget .* 1.5"),  # type: ignore[arg-type]
    "trace": (lambda: fastgrad.GradientFeatures(NET).trace(X[:1]), ValueError, "at least two samples .* held 1"),
    "compiled": (lambda: fastgrad.record(torch.compile(NET)), TypeError, "not its compiled form"),
    "rule": (lambda: register_rule(NET), TypeError, "module_types must be .*; one was Linear"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_the_error_names_the_argument(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
