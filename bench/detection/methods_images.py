"""Published detectors that need the images: gradients of the input, several layers, or gradients of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.detection.experiment import BATCH, IMAGES, Fit, NotRun, Seen, read
from bench.detection.methods_ours import log_norms, logistic
from bench.detection.registry import Protocol, Score, method
from fastgrad.scores.mahalanobis import Mahalanobis


@method("ODIN", 2018, "Liang et al., ICLR", slow=True)
def odin(fit: Fit) -> Score:
    from pytorch_ood.detector import ODIN

    if fit.experiment.kind not in IMAGES:
        raise NotRun("moves inputs along their gradient, and tokens have none")
    detector = ODIN(fit.experiment.model)
    return lambda seen: torch.cat([detector.predict(x).detach() for x in seen.images.split(BATCH)])


@method("GradUncertainty", 2020, "Lee and AlRegib, ICIP; the last layer, as in OpenOOD")
def grad_uncertainty(fit: Fit) -> Score:
    from pytorch_ood.detector import GradUncertainty

    detector = GradUncertainty(nn.Sequential(fit.layer))
    return lambda seen: torch.cat([detector.predict(h).detach() for h in seen.h.split(BATCH)])


@method("gradient norms", 2022, "Lee et al.: all parameters, scored from clean data by a Gaussian", slow=True)
def gradient_norms(fit: Fit) -> Score:
    clean = log_norms(fit.clean)
    gaussian = Mahalanobis.fit(clean, directions=clean.shape[1])
    return lambda seen: gaussian(log_norms(seen).double())


@method("MultiMahalanobis", 2018, "Lee et al., NeurIPS: every stage")
def several_stages(fit: Fit) -> Score:
    from pytorch_ood.detector import MultiMahalanobis

    made = MultiMahalanobis([nn.Identity() for _ in fit.clean.stages])
    made.fit_structured(fit.clean.stages, fit.labels)
    return lambda seen: made.predict_structured(seen.stages)


def pull(h: Tensor, prototypes: Tensor) -> Tensor:
    """Return the gradient by the last of the prototypes ``(N + 1, D)`` of a loss at ``h`` ``(n, D)``: ``(n, D)``.

    The loss is the cross-entropy of the negative distances with any class, the last prototype being none.
    """
    share = (-torch.cdist(h, prototypes)).softmax(1)[:, -1:]
    return share * F.normalize(h - prototypes[-1], dim=1)


@method("GROOD", 2025, "ElAraby et al., TMLR: the foreign prototype from uniform noise alone, not from mixed maps")
def grood(fit: Fit) -> Score:
    """Return the squared distance of `pull` to the nearest one of the clean images that are classified rightly."""
    if fit.experiment.kind not in IMAGES:
        raise NotRun("its foreign prototype is the mean of h over images of noise")
    h, labels = fit.clean.h.double(), fit.labels
    shape = (10 * BATCH, *fit.clean.images.shape[1:])
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    foreign = torch.from_numpy(read(fit.experiment, noise)["h"]).double().mean(0)
    prototypes = torch.stack([*(h[labels == k].mean(0) for k in labels.unique()), foreign])

    def gradients(seen: Seen) -> Tensor:
        return pull(seen.h.double(), prototypes)

    known = gradients(fit.clean)[fit.clean.logits.argmax(1) == labels]
    return lambda seen: torch.cdist(gradients(seen), known).amin(1).square()


#: Columns ``(n, k)`` that a labelled method may read.
COLUMNS: Mapping[str, Callable[[Seen], Tensor]] = {
    "stages": lambda seen: torch.cat(seen.stages, 1),
    "logits": lambda seen: seen.logits.sort(1, descending=True).values[:, :50],
    "h": lambda seen: seen.h,
    "gradients": log_norms,
}


def labelled(names: Sequence[str], fit: Fit) -> Score:
    """Return a logistic regression on several of `COLUMNS`, trained with labelled images of the case."""
    return logistic(lambda seen: torch.cat([COLUMNS[name](seen) for name in names], 1), fit.clean, fit.challenges)


for _name, _year, _paper, _names in (
    ("gradient norms", 2022, "Lee et al.: all parameters", ["gradients"]),
    ("activations", 2022, "control: means of every stage", ["stages"]),
    ("logits", 2022, "control", ["logits"]),
    ("h", 2022, "control", ["h"]),
    ("all but gradients", 2026, "control: stages, logits and h", ["stages", "logits", "h"]),
    ("all with gradients", 2026, "control: the same and gradient norms", [*COLUMNS]),
):
    method(f"{_name}, labelled", _year, _paper, Protocol.LABELLED)(partial(labelled, _names))
