"""A `TwoStageModel` wherever pytorch-ood expects one of its detectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad.checks import extra
from fastgrad.detector.model import TwoStageModel


def as_pytorch_ood(two_stage: TwoStageModel, **fit_options: Any) -> Any:
    """``two_stage`` as a ``pytorch_ood.api.Detector``, for its benchmarks and metrics.

    ``fit(data_loader)`` fits the two-stage model on the batches ``(x, labels)``; labels below 0 mark what is
    out of distribution there, and such samples are left out. ``predict(x)`` gives the uncertainty ``(B,)``,
    higher for out of distribution, as pytorch-ood counts.

    Args:
        two_stage: Fitted already, or to be fitted by ``fit``.
        **fit_options: Further arguments of `TwoStageModel.fit`.

    Raises:
        MissingExtraError: pytorch-ood is not installed.
    """
    with extra("interop"):
        from pytorch_ood.api import Detector

    def inside(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for x, given in loader:
            labels = torch.as_tensor(given)
            checks.is_tensor("x", x)
            checks.shape_is("labels", labels, (len(x),), "one a sample")
            known = labels >= 0
            if known.any():
                yield x[known], labels[known]

    class FastgradDetector(Detector):  # type: ignore[misc]
        requires_fit = True

        def __init__(self) -> None:
            self.two_stage = two_stage

        def fit(self, data_loader: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
            self.two_stage.fit(inside(data_loader), **fit_options)
            return self

        def predict(self, x: Tensor) -> Tensor:
            result: Tensor = self.two_stage(x).uncertainty
            return result

    return FastgradDetector()
