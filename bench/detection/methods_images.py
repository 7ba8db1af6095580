"""Published detectors that need the images: gradients of the input, several layers, or gradients of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.detection import recipes
from bench.detection.methods_ours import log_norms, logistic
from bench.detection.registry import IMAGES, NotRun, Protocol, Score, method
from bench.detection.subject import BATCH, Fit, Seen
from fastgrad.scores.mahalanobis import Mahalanobis


@method("ODIN", 2018, "Liang et al., ICLR", slow=True)
def odin(fit: Fit) -> Score:
    from pytorch_ood.detector import ODIN

    if fit.subject.kind not in IMAGES:
        raise NotRun("moves inputs along their gradient, and tokens have none")
    detector = ODIN(fit.subject.model)
    return lambda seen: torch.cat([detector.predict(x).detach() for x in seen.images.split(BATCH)])


@method("GradUncertainty", 2020, "Lee and AlRegib, ICIP; the last layer, as in OpenOOD")
def grad_uncertainty(fit: Fit) -> Score:
    from pytorch_ood.detector import GradUncertainty

    detector = GradUncertainty(nn.Sequential(fit.layer))
    return lambda seen: torch.cat([detector.predict(h).detach() for h in seen.h.split(BATCH)])


@method("DUQ", 2020, "van Amersfoort et al., ICML; a training of its own")
def duq(fit: Fit) -> Score:
    if fit.subject.network != recipes.NETWORK:
        raise NotRun("needs a training of its own")
    model = recipes.centroids(fit.subject.options)
    return lambda seen: torch.cat([1 - model(x).amax(1) for x in seen.images.split(BATCH)])


@method("gradient norms", 2022, "Lee et al.: all parameters, scored from clean data by a Gaussian", slow=True)
def gradient_norms(fit: Fit) -> Score:
    clean = log_norms(fit.clean)
    gaussian = Mahalanobis.fit(clean.double().numpy(), directions=clean.shape[1])
    return lambda seen: gaussian(log_norms(seen).double())


@method("MultiMahalanobis", 2018, "Lee et al., NeurIPS: every stage")
def several_stages(fit: Fit) -> Score:
    from pytorch_ood.detector import MultiMahalanobis

    made = MultiMahalanobis([nn.Identity() for _ in fit.clean.stages])
    made.fit_structured(fit.clean.stages, fit.labels)
    return lambda seen: made.predict_structured(seen.stages)


def labelled(name: str, year: int, paper: str, columns: Callable[[Fit], Callable[[Seen], Tensor]]) -> None:
    """Register a logistic regression on columns ``(n, k)``, trained with labelled images of the case."""
    method(name, year, paper, Protocol.LABELLED)(lambda fit: logistic(columns(fit), fit.clean, fit.challenges))


#: Columns that a labelled method may read.
COLUMNS: Mapping[str, Callable[[Seen], Tensor]] = {
    "stages": lambda seen: torch.cat(seen.stages, 1),
    "logits": lambda seen: seen.logits.sort(1, descending=True).values[:, :50],
    "h": lambda seen: seen.h,
    "gradients": log_norms,
}


def joined(names: Sequence[str], fit: Fit) -> Callable[[Seen], Tensor]:
    """Return several of `COLUMNS` side by side."""
    return lambda seen: torch.cat([COLUMNS[name](seen) for name in names], 1)


for _name, _year, _paper, _names in (
    ("gradient norms", 2022, "Lee et al.: all parameters", ["gradients"]),
    ("activations", 2022, "control: means of every stage", ["stages"]),
    ("logits", 2022, "control", ["logits"]),
    ("h", 2022, "control", ["h"]),
    ("all but gradients", 2026, "control: stages, logits and h", ["stages", "logits", "h"]),
    ("all with gradients", 2026, "control: the same and gradient norms", [*COLUMNS]),
):
    labelled(f"{_name}, labelled", _year, _paper, partial(joined, _names))


def local_dimensionality(fit: Fit, neighbours: int = 20, bank: int = 100) -> Callable[[Seen], Tensor]:
    """Return for every stage ``-1 / mean(log(d_i / d_k))`` over the k nearest clean images of ``bank``."""
    clean = [stage[:bank] for stage in fit.clean.stages]

    def of(seen: Seen) -> Tensor:
        columns = []
        for known, values in zip(clean, seen.stages, strict=True):
            distance = torch.cdist(values, known)
            # A sample must not be a neighbour of itself.
            distance[distance < 1e-4] = torch.inf
            nearest = distance.topk(min(neighbours, len(known) - 1), 1, largest=False).values
            columns.append(-1 / (nearest / nearest[:, -1:]).clamp_min(1e-12).log().mean(1).clamp_max(-1e-6))
        return torch.stack(columns, 1)

    return of


labelled("LID", 2018, "Ma et al., ICLR", local_dimensionality)
