"""Use a `TwoStageModel` wherever pytorch-ood expects one of its detectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgrad import checks
from fastgrad.batches import split_batch
from fastgrad.checks import extra
from fastgrad.detector.model import TwoStageModel


def as_pytorch_ood(two_stage: TwoStageModel, **fit_options: Any) -> Any:
    """Return ``two_stage`` as a ``pytorch_ood.api.Detector``, for the benchmarks and metrics of pytorch-ood.

    ``fit(data_loader)`` fits the two-stage model on batches ``(x, labels)``. It leaves out samples with labels below 0,
    which pytorch-ood uses for out-of-distribution samples. ``predict(x)`` returns the uncertainty ``(B,)``, which is
    higher out of distribution, as in pytorch-ood.

    Args:
        two_stage: A fitted model, or one to be fitted by ``fit``.
        **fit_options: Further arguments of `TwoStageModel.fit`.

    Raises:
        MissingExtraError: pytorch-ood is not installed.
        TypeError: ``two_stage`` is not a `TwoStageModel`.
    """
    with extra("interop"):
        from pytorch_ood.api import Detector

    checks.is_a(TwoStageModel, two_stage=two_stage)

    def inside(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        checks.is_loader("data_loader", loader)
        for batch in loader:
            x, given = split_batch("data_loader", batch)
            checks.is_tensor("x", x)
            assert isinstance(x, Tensor)
            if given is None:
                raise ValueError("data_loader must give (x, labels); it gave inputs alone")
            labelled = torch.from_numpy(checks.to_array("labels", given)) >= 0
            checks.shape_is("labels", labelled, (len(x),), "one a sample")
            if labelled.any():
                yield x[labelled], torch.as_tensor(given, device="cpu")[labelled]

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
