"""Who says best where a network is wrong: the answers of every method, and areas with intervals.

A method's uncertainty orders the answers of its own network. The area under its risk-coverage curve, the mean error
over all coverages, is compared with the softmax's on the same resampled inputs; copies of one input (its corruptions)
are drawn together, so that an interval does not take them for independent ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.paper.resampled import RESAMPLES, bounds
from fastgrad import TwoStageModel
from fastgrad.metrics import aurc, risk_coverage

Array = NDArray[np.float64]
SOFTMAX, ENSEMBLE = "softmax", "ensemble"


class Answers(NamedTuple):
    """Of one method on some inputs.

    Attributes:
        uncertainty: ``(n,)``, higher is less reliable.
        errors: ``(n,)``, whether the network was wrong.
    """

    uncertainty: Array
    errors: Array


class Judge:
    """One network and everything that says how sure it is.

    Args:
        model: Fitted, with labels.
        calibration: Batches of labelled inputs that the network was not trained on.
    """

    def __init__(self, model: TwoStageModel, calibration: Sequence[tuple[Any, Tensor]]) -> None:
        from pytorch_ood.detector import TemperatureScaling

        self.model = model
        logits, probabilities, _ = self._outputs(calibration)
        labels = torch.cat([own for _, own in calibration])
        self.temperature = TemperatureScaling(None)
        with torch.enable_grad():
            self.temperature.fit_logits(logits, labels)
        self.known = np.sort(_doubt(probabilities))

    def __call__(self, batches: Sequence[tuple[Any, Tensor]]) -> tuple[dict[str, Answers], Tensor]:
        """Every method's answers, and the network's softmax ``(n, N)``."""
        z, probabilities, uncertainty = self._outputs(batches)
        softmax = z.softmax(1)
        two = softmax.topk(2, 1).values
        doubt = _doubt(probabilities)
        above = len(self.known) - np.searchsorted(self.known, doubt)
        scores = {
            SOFTMAX: _doubt(softmax),
            "temperature": self.temperature.predict_logits(z).detach().numpy(),
            "margin": (two[:, 1] - two[:, 0]).numpy(),
            "entropy": torch.special.entr(softmax).sum(1).numpy(),
            "energy": -z.logsumexp(1).numpy(),
            "fastgrad, probabilities": doubt,
            "fastgrad, uncertainty": uncertainty.numpy(),
            # Fisher's sum of two p-values: of the probability, by counting, and of the uncertainty.
            "fastgrad, both": uncertainty.numpy() - np.log((1 + above) / (1 + len(self.known))),
        }
        errors = wrong(z, batches)
        return {name: Answers(score, errors) for name, score in scores.items()}, softmax

    def prices(self) -> dict[str, float]:
        """Forward passes of this package's rows; what only reads the logits costs the one that gives them."""
        price = self.model.report().price[1]
        return {"fastgrad, uncertainty": price, "fastgrad, both": price}

    def _outputs(self, batches: Sequence[tuple[Any, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            parts = [self.model(x) for x, _ in batches]
        logits, probabilities, uncertainty = (torch.cat(own).double() for own in zip(*parts, strict=True))
        return logits, probabilities, uncertainty


def _doubt(probabilities: Tensor) -> Array:
    return 1 - probabilities.amax(1).numpy()


def wrong(values: Tensor, batches: Sequence[tuple[Any, Tensor]]) -> Array:
    """Whether the highest of ``values`` ``(n, N)`` is not the label's."""
    labels = torch.cat([own for _, own in batches])
    return (values.argmax(1) != labels).double().numpy()


def ensemble(members: Sequence[Tensor], batches: Sequence[tuple[Any, Tensor]]) -> Answers:
    """The mean of several networks' softmaxes (Lakshminarayanan, Pritzel and Blundell, 2017)."""
    mean = torch.stack(list(members)).mean(0)
    return Answers(_doubt(mean), wrong(mean, batches))


def areas(
    found: Mapping[str, Sequence[Answers]], source: NDArray[np.int64], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Of every method the area, its oracle's, and the difference to the softmax, means over networks.

    Args:
        found: Method to the answers of each network, or of the one ensemble.
        source: ``(n,)``, which inputs are copies of one.
        seed: Of the resamples.

    Returns:
        By method ``errors``, ``aurc``, ``oracle``, ``less softmax``, and 95 % intervals of the second and the last.
    """
    ids, places = np.unique(source, return_inverse=True)
    rng = np.random.default_rng(seed)
    samples = [np.arange(len(source))]
    for _ in range(RESAMPLES):
        drawn = np.bincount(rng.integers(0, len(ids), len(ids)), minlength=len(ids))
        samples.append(np.repeat(np.arange(len(source)), drawn[places]))
    area = {
        method: np.array([np.mean([aurc(one.uncertainty[i], one.errors[i]) for one in own]) for i in samples])
        for method, own in found.items()
    }
    rows = {}
    for method, own in found.items():
        less = area[method] - area[SOFTMAX]
        rows[method] = {
            "errors": float(np.mean([one.errors.mean() for one in own])),
            "aurc": float(area[method][0]),
            "interval": bounds(area[method][1:]),
            "oracle": float(np.mean([risk_coverage(*one).best.mean() for one in own])),
            "less softmax": float(less[0]),
            "interval of the difference": bounds(less[1:]),
        }
    return rows


def curve(own: Sequence[Answers]) -> tuple[Array, Array, Array]:
    """Coverage, risk and the oracle's risk ``(n,)``, means over networks."""
    curves = [risk_coverage(*one) for one in own]
    return (
        curves[0].coverage,
        np.mean([one.risk for one in curves], 0),
        np.mean([one.best for one in curves], 0),
    )


def standing(interval: Sequence[float]) -> str:
    """Whether a difference in area, lower being better, is one: ``better``, ``worse`` or ``none``."""
    low, high = interval
    return "better" if high < 0 else "worse" if low > 0 else "none"
