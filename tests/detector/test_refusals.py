"""What the detector and the two-stage model refuse, with an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from fastgrad import TwoStageModel, UncertaintyDetector

ROWS = np.random.default_rng(0).random((60, 6))
IMAGES = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()


def fitted() -> UncertaintyDetector:
    return UncertaintyDetector(folds=2).fit(ROWS)


def scripted() -> nn.Module:
    traced: nn.Module = torch.jit.trace(NET, IMAGES)
    return traced


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "folds": (lambda: UncertaintyDetector(folds=1).fit(ROWS), ValueError, "folds .* it was 1"),
    "norms": (lambda: UncertaintyDetector().fit({"gradients": -ROWS}), ValueError, r"X\['gradients'\] must hold"),
    "no rows": (lambda: UncertaintyDetector().fit(np.ones((0, 2, 3))), ValueError, "X must not be empty"),
    "labels": (lambda: UncertaintyDetector().fit(ROWS, np.full(60, np.nan)), ValueError, "y must be finite"),
    "not fitted": (lambda: UncertaintyDetector().decision_function(ROWS), NotFittedError, "not fitted yet"),
    "other blocks": (lambda: fitted().decision_function({"logits": ROWS}), ValueError, "blocks and shapes of fit"),
    "label count": (lambda: fitted().score(ROWS, [0, 1]), ValueError, "y must have one label per row"),
    "few": (lambda: TwoStageModel(NET).fit([IMAGES[:3]], None), ValueError, "at least"),
    "risk": (lambda: TwoStageModel(NET).fit([IMAGES], None, risk="yes"), TypeError, "risk must be .* 'yes'"),  # type: ignore[arg-type]
    "verbose": (lambda: TwoStageModel(NET).fit([IMAGES], None, verbose=2), TypeError, "verbose must be .* 2"),  # type: ignore[arg-type]
    "scripted": (lambda: TwoStageModel(nn.Sequential(scripted())), TypeError, "ordinary modules; '0' was a"),
    "unknown file": (lambda: TwoStageModel.load("no/such.safetensors", NET), FileNotFoundError, "no/such"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("case", BAD)
def test_the_error_names_the_argument(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
