from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deploy_models import TinyTwoStage
from exported_models import X
from torch import Tensor

from fastgrad.deploy.file.comparison import compare, difference


def check(file: Path, change: Callable[[Tensor, Tensor], Tensor], tolerance: float = 1e-4) -> None:
    """Compare a file with its model, of which the uncertainty ``u`` of inputs ``x`` is changed to ``change(x, u)``."""
    live = TinyTwoStage()

    def answers(x: Tensor) -> tuple[Tensor, ...]:
        (logits, probabilities, uncertainty), parts = live.explain(x)
        return logits, probabilities, change(x, uncertainty), torch.stack(list(parts.values()), -1)

    compare(file, answers, X, tolerance, torch.finfo(torch.float32).eps)


def test_difference_from_the_live_model(model_file: Path) -> None:
    check(model_file, lambda x, u: u)
    with pytest.raises(
        RuntimeError, match=r"the file's uncertainty differ .* by 0\.001, .* at most 0\.0001 is allowed"
    ):
        check(model_file, lambda x, u: u + 1e-3)
    check(model_file, lambda x, u: u + 1e-3, tolerance=1e-2)


def test_nan_is_not_reliable(model_file: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the file's uncertainty differ .* by inf"):
        check(model_file, lambda x, u: u.nan_to_num())


def test_difference_that_rounding_explains(model_file: Path) -> None:
    # As far apart, but the live answer itself moves as far with the last digits of its input.
    check(model_file, lambda x, u: u + 1e-3 * torch.sin(1e9 * x.double().flatten(1).sum(1)).float())


def test_equal_infinities_are_no_difference() -> None:
    live = torch.tensor([1.0, torch.inf, torch.nan, 100.0])
    assert difference(live, live) == 0
    assert difference(live + 1, live) == 1
    assert difference(live.nan_to_num(), live) == torch.inf
