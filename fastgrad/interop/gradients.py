"""pytorch-ood's detectors of gradient norms: its classes, arguments and values, without a gradient for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_ood import detector
from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import original, outside_of_compilation
from fastgrad.batches import class_logits, logits_of
from fastgrad.engine.norms import squared_norms
from fastgrad.engine.recorded import Recorded
from fastgrad.engine.refusals import refuse_mixing, refuse_parts
from fastgrad.engine.run import run
from fastgrad.gradients.gram import abs_sums

#: From a call, losses ``(B,)`` and parameters by id to norms ``(B,)`` of those that the losses depend on.
Norms = Callable[[Recorded, Tensor, Mapping[int, Tensor]], Mapping[int, Tensor]]


class GradNorm(detector.GradNorm):  # type: ignore[misc]
    """pytorch-ood's ``GradNorm`` (Huang et al., NeurIPS 2021): minus the L1 norm of each sample's gradient.

    The loss is the cross-entropy with the uniform distribution at ``temperature``. Arguments and scores are those of
    pytorch-ood, up to rounding. The model keeps its mode, is left as it was, and must not mix samples. It may return
    whatever `fastgrad.batches.logits_of` reads.

    Args:
        model: As for `fastgrad.record`.
        param_filter: Tells from a parameter's name whether it counts; None for all. Those left out cost no gradient.
        micro_batch_size: Samples at a time.
        temperature: Divides the logits.

    Raises:
        ValueError: From ``predict``, if no parameter is selected, or if the model mixes samples, as from
            `fastgrad.record`.
    """

    def __init__(
        self, model: nn.Module, param_filter: Callable[[str], bool] | None = None, micro_batch_size: int = 32,
        temperature: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(model, param_filter, micro_batch_size, temperature)

    def predict(self, x: Tensor) -> Tensor:
        """Return outlier scores ``(B,)``, higher out of distribution."""

        def losses(z: Tensor) -> Tensor:
            each: Tensor = -(z / self.temperature).log_softmax(1).mean(1)
            return each

        return _scores(self, x, losses, abs_sums)


class GradUncertainty(detector.GradUncertainty):  # type: ignore[misc]
    """pytorch-ood's ``GradUncertainty``, after Lee and AlRegib (ICIP 2020): minus each sample's squared L2 norm.

    The loss is the binary cross-entropy of the softmax with a label of ones, which pytorch-ood takes; that of the paper
    and of `fastgrad.GradientFeatures` is of the sigmoids. The model is treated as by `GradNorm`.

    Args:
        model: As for `fastgrad.record`.
        param_filter: Tells from a parameter's name whether it counts; None for all.
        micro_batch_size: Samples at a time; pytorch-ood takes all at once.

    Raises:
        ValueError: From ``predict``, as `GradNorm`.
    """

    def __init__(
        self, model: nn.Module, param_filter: Callable[[str], bool] | None = None, micro_batch_size: int = 32
    ) -> None:
        super().__init__(model, param_filter)
        self.micro_batch_size = micro_batch_size

    def predict(self, x: Tensor) -> Tensor:
        """Return outlier scores ``(B,)``, higher out of distribution."""

        def losses(z: Tensor) -> Tensor:
            return F.binary_cross_entropy(z.softmax(1), torch.ones_like(z), reduction="none").sum(1)

        def norms(call: Recorded, losses: Tensor, wanted: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
            return squared_norms([call], [losses], [torch.ones_like(losses)], wanted)

        return _scores(self, x, losses, norms)


def _scores(detector: Any, x: Tensor, losses: Callable[[Tensor], Tensor], norms: Norms) -> Tensor:
    checks.is_tensor("x", x)
    checks.at_least(1, micro_batch_size=detector.micro_batch_size)
    model, wanted = original(detector.model), {id(p): p for p in detector._selected_params().values()}
    refuse_parts(model)
    refuse_mixing(model, training=True)
    own = x.to(detector.device)
    compute = outside_of_compilation(_norms)
    with torch.inference_mode(False), torch.enable_grad():
        own = own.clone().detach() if own.is_inference() else own.detach()
        parts = own.split(detector.micro_batch_size)
        return -torch.cat([compute(model, part, wanted, losses, norms) for part in parts])


def _norms(
    model: nn.Module, x: Tensor, wanted: Mapping[int, Tensor], losses: Callable[[Tensor], Tensor], norms: Norms
) -> Tensor:
    """Return the sums ``(B,)`` of the norms of all parameters."""
    output, recorded = run(model, lambda own: own, (x,), {}, wanted, undo=True)
    try:
        each = losses(class_logits(logits_of(output), recorded.samples))
        total = torch.zeros_like(each)
        if each.requires_grad and recorded.samples:
            for found in norms(recorded, each, wanted).values():
                total = total + found.to(total)
        return total.detach()
    finally:
        recorded.close()
