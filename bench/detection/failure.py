"""Which answers are wrong: the risk and other scores, judged by the network's errors.

They are judged on clean images, and on these together with each group of cases; every answer to an image of another set
is wrong. Resampled intervals draw all copies of an image together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import log_loss

from bench.detection import resampled, runner, train
from bench.detection.cases import ALIKE, CHANGED_FILES, CHANGED_TEXTS, STRANGE, UNALIKE
from bench.detection.experiment import BATCH, CASES, Experiment, Fit, NotRun, Options, Seen
from bench.detection.methods_ours import answer, fitted
from bench.detection.registry import METHODS, Method, Protocol
from bench.detection.tables import CIFAR, LITE
from fastgrad.blocks import DEFAULT_BLOCKS
from fastgrad.metrics import aurc

Values = NDArray[np.float64]
DEFAULT_NETWORKS = (*LITE, *CIFAR, "news", "magika")
#: Scores of one pass.
RIVALS = (
    "softmax", "entropy", "margin", "energy", "MaxLogit", "GEN", "pNormSoftmax", "GradTrust", "KNN", "ViM",
    "fastgrad, clean only", "fastgrad, default",
)  # fmt: skip
GROUPS: Mapping[str, tuple[str, ...]] = {
    "clean": (), "clean and corruptions": (ALIKE, UNALIKE, *CHANGED_TEXTS, *CHANGED_FILES),
    "clean and attacks": ("attacks", "attacks after JPEG"),
    "clean and other sets": STRANGE,
}  # fmt: skip
PROBABILITIES = ("softmax", "softmax, temperature", "ensemble of five", "fastgrad, risk")


class Judged(NamedTuple):
    """Answers to some images: whether each is wrong, and the clean image that the input is or was made from."""

    wrong: Values
    source: NDArray[np.int64]


def risk(fit: Fit) -> Callable[[Seen], torch.Tensor]:
    """Return the risk of a model fitted on labels and generated challenges."""
    two_stage = fitted(fit, DEFAULT_BLOCKS)
    return lambda seen: answer(two_stage, seen).risk  # type: ignore[return-value]


def scaled(fit: Fit) -> Callable[[Seen], torch.Tensor]:
    """Return 1 - the largest softmax probability at a temperature fitted on the clean images."""
    two_stage = fitted(fit, ("logits",), None)
    return lambda seen: 1 - answer(two_stage, seen).probabilities.amax(1)


def ensemble(fit: Fit) -> Callable[[Seen], torch.Tensor]:
    """Return 1 - the mean probability of the network's answer, over it and four networks of other seeds."""
    experiment = fit.experiment
    name, options, seeds = experiment.network, experiment.options, range(1, 5)
    if name != "resnet20":  # the one small enough to be trained five times
        raise NotRun("needs four more trainings of the network")
    if options.quick and not all(train.file(name, seed, options.cache).exists() for seed in seeds):
        raise NotRun("needs four more trainings of the network, which quick mode leaves out")
    models = [experiment.model, *(train.trained(name, seed, options.data, options.cache) for seed in seeds)]

    @torch.no_grad()
    def score(seen: Seen) -> torch.Tensor:
        p = torch.stack([torch.cat([one(x).softmax(1) for x in seen.images.split(BATCH)]) for one in models]).mean(0)
        return 1 - p.gather(1, seen.logits.argmax(1, keepdim=True))[:, 0]

    return score


OWN = (
    Method("ensemble of five", 2017, "Lakshminarayanan et al., NeurIPS", Protocol.CLEAN, ensemble),
    Method("softmax, temperature", 2017, "Guo et al., ICML", Protocol.CLEAN, scaled),
    Method("fastgrad, risk", 2026, "the default", Protocol.GENERATED, risk),
)


def judged(experiment: Experiment, case: str) -> Judged:
    """Return the errors of a case; every answer to an image of no class is one."""
    seen, labels = experiment.seen(case), experiment.parts["test"][1]
    source = seen.shown.source
    wrong = (seen.logits.argmax(1) != labels[source.clamp_min(0)]) | (source < 0)
    # Images of other sets are drawn independently.
    own = torch.where(source < 0, len(labels) + torch.arange(len(source)), source)
    return Judged(wrong.double().numpy(), own.numpy())


def row(scores: Values, found: Judged, probability: bool) -> dict[str, Any]:
    values = resampled.grouped_auroc(scores, found.wrong, found.source)
    made = resampled.columns("auroc", values) | {"aurc": round(1000 * aurc(scores, found.wrong), 1)}
    if probability:
        # Differences between the stated risk and the errors, summed in 15 bins of the stated risk.
        differences = np.bincount(np.minimum((scores * 15).astype(int), 14), scores - found.wrong)
        made["ece"] = round(float(np.abs(differences).sum() / len(scores)), 4)
        made["log loss"] = round(float(log_loss(found.wrong, scores)), 4)
    return made


def measure(experiment: Experiment) -> list[dict[str, Any]]:
    groups = {name: case.group for name, case in CASES.items() if experiment.kind in case.kinds}
    wanted = {group: [part for part in parts if part in groups.values()] for group, parts in GROUPS.items()}
    wanted = {group: parts for group, parts in wanted.items() if parts or group == "clean"}
    wanted["everything"] = [part for parts in wanted.values() for part in parts]
    judgements: dict[str, Judged] = {"clean": judged(experiment, "clean")}
    lost: dict[str, str] = {}
    for case in (case for case, group in groups.items() if group in wanted["everything"]):
        try:
            judgements[case] = judged(experiment, case)
        except runner.ABSENT as why:
            # If no image misleads the network, there is nothing to judge.
            lost |= {} if "misleads" in str(why) else {case: str(why)}
    cases = list(judgements)[1:]
    rows = []
    for method in (*(METHODS[name] for name in RIVALS), *OWN):
        found, left = runner.measure(experiment, method, cases)
        for group, parts in wanted.items():
            own = ["clean", *(case for case in cases if groups[case] in parts)]
            head = runner.head_of(experiment, method) | {"case": group, "group": group}
            absent = [why for case, why in (lost | left).items() if case in own or groups.get(case) in parts]
            if absent:
                rows.append(head | {"not run": "; ".join(dict.fromkeys(absent))})
                continue
            together = Judged(*(np.concatenate(values) for values in zip(*(judgements[c] for c in own), strict=True)))
            scores = np.concatenate([found[case] for case in own])
            rows.append(head | row(scores, together, method.name in PROBABILITIES))
    return rows


def run(options: Options, networks: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = runner.over(networks, options, measure)
    return rows, runner.facts("Which answers are wrong", options, {**METHODS, **{one.name: one for one in OWN}})
