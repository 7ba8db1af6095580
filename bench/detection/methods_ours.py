"""fastgrad's own detectors, through its public interface, and the control that has the same challenges.

The blocks that they read are cached, so that forms of the detector share them; `TwoStageModel.fit` and a call do all
else, as for users.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from bench.detection.experiment import BATCH, IMAGES, TEXTS, Experiment, Fit, NotRun, Seen, Shown, packed
from bench.detection.registry import METHODS, Protocol, Score, method
from fastgrad import TwoStageModel
from fastgrad.blocks import BLOCKS, DEFAULT_BLOCKS, Block, Features, Gradients
from fastgrad.blocks.extraction import Extraction
from fastgrad.blocks.subject import watch
from fastgrad.detector import collect, fitting
from fastgrad.prediction import Prediction

#: Published scores that the control's logistic regression reads: those of one pass that need no classes.
SCORES = (
    "softmax", "energy", "MaxLogit", "entropy", "GEN", "GradNorm", "KNN", "ViM", "DICE", "NCI", "fDBD", "NNGuide",
    "ReAct", "ASH", "SCALE", "VRA", "KLMatching", "Mahalanobis", "Catalyst", "RAS",
)  # fmt: skip


class AllNorms(Gradients):
    """Squared gradient norms of every parameter for one signal, as published."""

    name = "all_norms"

    signals = Gradients.signals[:1]
    price = 3.5


class NormalisationNorms(AllNorms):
    """The same for vectors alone: weights and biases of normalisation layers, and the last layer's bias."""

    name = "normalisation_norms"


MADE = {kind.name: kind for kind in (*BLOCKS.values(), AllNorms, NormalisationNorms)}
#: Groups of blocks that are read, and cached, together.
READINGS = ((*DEFAULT_BLOCKS, "features", "contrasts"), ("view",), ("all_norms",))


def blocks_of(experiment: Experiment, where: str, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return those of the named blocks that the network can serve, read from the inputs or the cache."""
    wanted = {"all_norms" if name == NormalisationNorms.name else name for name in names}
    found: dict[str, Tensor] = {}
    for group in READINGS:
        if wanted & set(group):
            kept = experiment.kept(
                f"blocks/{'-'.join(group)}/{where}", lambda group=group: _read(experiment, images, group)
            )
            found |= {name: torch.from_numpy(value) for name, value in kept.items()}
    if NormalisationNorms.name in names:
        vectors = torch.tensor([parameter.dim() == 1 for parameter in experiment.model.parameters()])
        found[NormalisationNorms.name] = found["all_norms"][..., vectors]
    return {name: found[name] for name in names if name in found}


def log_norms(seen: Seen) -> Tensor:
    """Return the logarithms of the squared norm of every parameter's gradient ``(n, P)``."""
    return blocks_of(seen.experiment, f"{seen.case}/{seen.part}", seen.images, [AllNorms.name])[AllNorms.name][:, 0]


def _read(experiment: Experiment, images: Tensor, names: Sequence[str]) -> dict[str, Any]:
    model = experiment.model.requires_grad_("all_norms" in names)
    known = watch(model, (images[:BATCH],), {})
    had = [block for block in (MADE[name]() for name in names) if block.refusal(known) is None]
    extraction = Extraction(model, had)
    # Given as users give a batch: texts come with the mask by which blocks leave out padding.
    given = (
        {"input_ids": x, "attention_mask": (x != 0).long()} if experiment.kind == TEXTS else x
        for x in packed(images).split(BATCH)
    )
    parts = [extraction(x)[1] for x in given]
    model.requires_grad_(False)
    return {name: torch.cat([part[name] for part in parts]).float().numpy() for name in parts[0]}


def read_for(fit: Fit, blocks: Sequence[Block], challenges: Any, *, shifts: bool = True, **given: Any) -> Features:
    """Return the features that a fit with these arguments would read; the cache keeps the inputs and the blocks.

    Without ``shifts`` no image is shifted by a part of a grey level.
    """
    experiment = fit.experiment
    clean, labels = experiment.parts["fit"]
    where = ("clean" if challenges is None else fit.case or "generated") + ("" if shifts else "-unshifted")

    def shown() -> dict[str, Any]:
        sample, *_ = fitting.prepare(
            experiment.model, None, blocks, experiment.draw, correct=False, clean=fit.loader(clean, labels),
            challenges=challenges, verbose=False, **given,
        )  # fmt: skip
        sample = sample if shifts else replace(sample, levels=None)
        with torch.enable_grad():
            parts = list(collect.batches_of(sample, experiment.model, experiment.draw, False))
        kinds, numbers = (list(itertools.chain.from_iterable(column)) for column in list(zip(*parts, strict=True))[1:])
        known = {name: value.numpy() for name, value in collect.known_of(sample, kinds, numbers).items()}
        inputs = torch.cat([torch.as_tensor(x) for x, *_ in parts]).numpy()
        return {"inputs": inputs, "kinds": np.array(kinds), "groups": np.array(numbers), **known}

    made = experiment.kept(f"inputs/{where}/fit", shown)
    inputs = torch.from_numpy(made["inputs"]).to(clean.dtype)
    values = blocks_of(experiment, f"{where}/fit", inputs, [*(block.name for block in blocks), "logits", "features"])
    known = {name: torch.from_numpy(made[name]) for name in ("sources", "labels", "held_out")}
    return Features.of(values["logits"], values, kinds=made["kinds"].tolist(), **known)


def fitted(
    fit: Fit, names: Sequence[str], challenges: Any = "generate", correct: Any = False, **given: Any
) -> TwoStageModel:
    """Return a model fitted on those of the named blocks that the network can serve; the cache keeps their values."""
    known = watch(fit.experiment.model, (fit.experiment.parts["fit"][0][:BATCH],), {})
    blocks = [block for block in (MADE[name]() for name in names) if block.refusal(known) is None]
    features = read_for(fit, blocks, challenges, **given)
    return TwoStageModel(fit.experiment.model, blocks=blocks, seed=fit.experiment.draw).fit_features(
        features, correct=correct
    )


def answer(two_stage: TwoStageModel, seen: Seen) -> Prediction:
    """Return a fitted model's answers to the inputs of a case."""
    wanted = [*(block.name for block in two_stage.extraction_.blocks), "logits"]
    values = blocks_of(seen.experiment, f"{seen.case}/{seen.part}", seen.images, wanted)
    return two_stage.predict_features(Features.of(values["logits"], values))


def _registered(name: str, paper: str, extra: Sequence[str] = (), challenges: Any = "generate") -> None:
    """Register a form of the detector: the default blocks and others beside them."""

    def make(fit: Fit) -> Score:
        experiment = fit.experiment
        once = experiment.draw == 0 and experiment.network not in ("lite1", "lite2", "magika", "resnet56-training")
        if experiment.options.quick and not once and not set(extra) <= {*READINGS[0], "view"}:
            raise NotRun("quick mode reads gradients of one draw, and not of every network")
        two_stage = fitted(fit, (*DEFAULT_BLOCKS, *extra), challenges)
        return lambda seen: answer(two_stage, seen).uncertainty

    protocol = Protocol.CLEAN if challenges is None else Protocol.GENERATED
    method(f"fastgrad{name}", 2026, paper, protocol)(make)


_registered(", clean only", "the default, challenges=None", challenges=None)
_registered(", default", "the default blocks")
_registered(", second pass", "the default blocks and the view", ("view",))
for _what, _block in {
    "all contrasts of the last layer": "contrasts", "norms of normalisation layers": NormalisationNorms.name,
    "norms of all parameters": AllNorms.name,
}.items():  # fmt: skip
    _registered(f", default + {_what}", "beside the default blocks: squared gradient norms", (_block,))
    _registered(f", clean only + {_what}", "the same, challenges=None", (_block,), None)


@method(
    "fastgrad, default + images as they are", 2026, "the default, but no image shifted by a part of a grey level",
    Protocol.GENERATED,
)  # fmt: skip
def as_they_are(fit: Fit) -> Score:
    if fit.experiment.kind not in IMAGES:
        raise NotRun("its inputs have no grey levels")
    two_stage = fitted(fit, DEFAULT_BLOCKS, shifts=False)
    return lambda seen: answer(two_stage, seen).uncertainty


@method("fastgrad, labelled", 2026, "the default, challenges=the case", Protocol.LABELLED)
def labelled(fit: Fit) -> Score:
    images = fit.challenges.images
    if len(images) < 16:  # with fewer, a fold may have none
        raise NotRun(f"needs 16 challenges; there are {len(images)}")
    two_stage = fitted(fit, DEFAULT_BLOCKS, fit.loader(images))
    return lambda seen: answer(two_stage, seen).uncertainty


class _Generated(Seen):
    """The challenges that fastgrad's default is fitted on."""

    @cached_property
    def shown(self) -> Shown:
        fitted(Fit(self.experiment), ("logits",))
        kept = self.experiment.kept("inputs/generated/fit", dict)
        made = kept["kinds"] != ""
        inputs = torch.from_numpy(kept["inputs"][made]).to(self.experiment.parts["fit"][0].dtype)
        return Shown(inputs, torch.from_numpy(kept["groups"][made]))


class _Second(Fit):
    """The second half of the clean images."""

    @property
    def clean(self) -> Seen:
        return _Half(self.experiment, "clean", "fit")

    @property
    def labels(self) -> Tensor:
        return super().labels[len(self.experiment.parts["fit"][1]) // 2 :]


class _Half(Seen):
    """The second half of a case's images."""

    @cached_property
    def shown(self) -> Shown:
        whole = self.experiment.seen(self.case, self.part).shown
        return Shown(*(value[len(whole.images) // 2 :] for value in whole))

    @cached_property
    def _read(self) -> dict[str, Tensor]:
        whole = self.experiment.seen(self.case, self.part)._read
        return {name: value[len(value) // 2 :] for name, value in whole.items()}


def logistic(columns: Callable[[Seen], Tensor], clean: Seen, other: Seen, before: int | None = None) -> Score:
    """Return the score of a logistic regression on standardised columns, with balanced class weights.

    It is trained on the images that are made from a part's images ``before`` a place, by default from all.
    """
    inside, outside = (
        columns(seen) if before is None else columns(seen)[seen.shown.source < before] for seen in (clean, other)
    )
    rows = torch.cat([inside, outside]).double().nan_to_num().numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    model.fit(rows, np.arange(len(rows)) >= len(inside))
    return lambda seen: torch.from_numpy(model.decision_function(columns(seen).double().nan_to_num().numpy()))


@method("published scores, labelled", 2026, "control: logistic regression on them", Protocol.LABELLED)
@method(
    "published scores, generated challenges", 2026,
    "control: logistic regression on those of one pass", Protocol.GENERATED,
)  # fmt: skip
def control(fit: Fit) -> Score:
    if len(fit.clean.h) > 10_000:
        raise NotRun("needs the distances between all training images")
    names = SCORES if fit.experiment.stages else [name for name in SCORES if name not in ("Catalyst", "RAS")]
    # Detectors score the images that they were fitted on as more usual than any others, so the regression learns from
    # the first half of the images, and those made from it.
    scores = [METHODS[name].fit(_Second(fit.experiment)) for name in names]
    half = len(fit.clean.h) // 2

    def columns(seen: Seen) -> Tensor:
        return torch.stack([score(seen).double() for score in scores], 1).detach()

    challenges = fit.challenges if fit.case else _Generated(fit.experiment, "generated", "fit")
    return logistic(columns, fit.clean, challenges, before=half)
