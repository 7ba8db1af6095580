"""fastgrad's own detectors, through its public interface, and the control that has the same challenges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.detection.methods_images import logistic
from bench.detection.registry import METHODS, NotRun, Protocol, Score, method
from bench.detection.subject import BATCH, Fit, Seen
from fastgrad import TwoStageModel
from fastgrad.challenges import iter_challenges

GENERATED, LABELLED = Protocol.GENERATED, Protocol.LABELLED
#: Labelled challenges that every fold has one of.
FEWEST = 16
#: What a logistic regression on published scores reads: those of one pass that need no classes.
SCORES = (
    "softmax", "energy", "MaxLogit", "entropy", "GEN", "GradNorm", "KNN", "ViM", "DICE", "NCI", "fDBD", "NNGuide",
    "ReAct", "ASH", "SCALE", "VRA", "KLMatching", "Mahalanobis", "Catalyst", "RAS",
)  # fmt: skip


def _fitted(fit: Fit, challenges: Any, **options: Any) -> Score:
    model = TwoStageModel(fit.model, seed=fit.subject.draw, **options)
    model.fit(fit.loader(fit.clean.images), challenges)

    def score(seen: Seen) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(x).uncertainty for x in seen.images.split(BATCH)])

    return score


@method("fastgrad, clean only", 2026, "the default, challenges=None")
def clean_only(fit: Fit) -> Score:
    return _fitted(fit, None)


@method("fastgrad, budget 1.2", 2026, "the default", GENERATED)
def default(fit: Fit) -> Score:
    return _fitted(fit, "generate")


@method("fastgrad, budget 2.5", 2026, "with a second look at the image", GENERATED)
def larger(fit: Fit) -> Score:
    return _fitted(fit, "generate", budget=2.5)


@method("fastgrad, labelled", 2026, "the default, challenges=the case", LABELLED)
def labelled(fit: Fit) -> Score:
    images = fit.challenges.images
    if len(images) < FEWEST:
        raise NotRun(f"needs {FEWEST} challenges; there are {len(images)}")
    return _fitted(fit, fit.loader(images))


class _Generated(Seen):
    """Challenges generated from the clean images, two of each, as `TwoStageModel.fit` makes them."""

    @property
    def images(self) -> Tensor:
        """``(n, C, H, W)``."""
        clean = self.subject.parts["fit"][0]
        made = iter_challenges(self.subject.model, clean, each=2, seed=self.subject.draw)
        images = torch.cat([batch.inputs for batch in made])
        return images.contiguous(memory_format=torch.channels_last)


@method(
    "published scores, generated challenges",
    2026,
    "control: logistic regression on the scores of one pass",
    GENERATED,
)
def control(fit: Fit) -> Score:
    return _regression(fit, _Generated(fit.subject, "generated", "fit"))


@method("published scores, labelled", 2026, "control: logistic regression on them", LABELLED)
def labelled_control(fit: Fit) -> Score:
    return _regression(fit, fit.challenges)


def _regression(fit: Fit, challenges: Seen) -> Score:
    fitted = _published(fit)
    if not fitted:
        raise NotRun("none of the published scores can be computed")

    def columns(seen: Seen) -> Tensor:
        return torch.stack([score(seen).double() for score in fitted], 1).detach()

    score = logistic(columns(fit.clean), columns(challenges))
    return lambda seen: score(columns(seen))


def _published(fit: Fit) -> list[Score]:
    return [METHODS[name].fit(Fit(fit.subject)) for name in SCORES]
