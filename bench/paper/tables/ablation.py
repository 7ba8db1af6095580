"""Ablation: loss, target, layers, joined signals, contrasts, and the parts of the detector.

Methods named ``one-class: ...`` are fitted on clean features alone. ``labelled: ...`` is a logistic regression for
each case, fitted on one half of its images and tested on the other and the reverse: what the features know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from bench.paper import detectors, own
from bench.paper.cache import Arrays
from bench.paper.cases import CASES, STRANGERS, short
from bench.paper.figures import grouped_bars
from bench.paper.labelled import logistic
from bench.paper.rows import Found, detection_rows, pivot
from bench.paper.subject import Subject, residual_networks
from bench.paper.table import Options, Page, Table
from fastgrad.blocks.gradients import RANKS, class_of_rank
from fastgrad.detector import UncertaintyDetector
from fastgrad.gradients import contrasts as functional
from fastgrad.gradients.features import GradientFeatures
from fastgrad.losses import LOSSES, TARGETS
from fastgrad.metrics import auroc

PUBLISHED = ("softmax", "energy", "KNN", "ViM", "Mahalanobis")
PAIRS = [(loss, target) for loss in LOSSES for target in TARGETS]
Rows = NDArray[np.float64]


def more_signals(subject: Subject, case: str, part: str = "test") -> Arrays:
    """Logarithms of squared norms, cached like the other features.

    ``signals`` ``(B, 12, P)`` for every loss and target, ``ranked`` ``(B, 10, P)`` for all contrasts.
    """
    contrasts = [("cross_entropy", partial(class_of_rank, rank=rank)) for rank in range(RANKS)]

    def make() -> Arrays:
        extractor = GradientFeatures(subject.model, signals=[*PAIRS, *contrasts], log=True, chunk_size=32)
        norms = extractor(subject.images(case, part))[1].float().numpy()
        return {"signals": norms[:, : len(PAIRS)], "ranked": norms[:, len(PAIRS) :]}

    return subject.kept(f"signals/{case}", part, make)


def feature_sets(subject: Subject) -> dict[str, Callable[[Arrays], Rows]]:
    """Name to what is read from the blocks: rows ``(B, d)`` of logarithms."""
    names = [name for name, _ in subject.model.named_parameters()]
    last = [i for i, name in enumerate(names) if name.startswith("fc.")]
    bce, joined = PAIRS.index(("bce", "ones")), "gradients"
    sets: dict[str, Callable[[Arrays], Rows]] = {
        f"{loss} {target}": lambda b, i=i: b["signals"][:, i] for i, (loss, target) in enumerate(PAIRS)
    }
    sets["three joined signals"] = lambda b: b[joined].reshape(len(b[joined]), -1)
    sets["twelve joined signals"] = lambda b: b["signals"].reshape(len(b["signals"]), -1)
    sets["all contrasts by rank"] = lambda b: b["ranked"].reshape(len(b["ranked"]), -1)
    sets["contrasts and joined signals"] = lambda b: np.concatenate(
        [b[name].reshape(len(b[name]), -1) for name in ("ranked", "gradients")], 1
    )
    sets["last layer only, joined signals"] = lambda b: b[joined][:, :, last].reshape(len(b[joined]), -1)
    sets["last layer only, all contrasts"] = _last_layer_contrasts
    for layer in ("stem", "stages.0", "stages.1", "stages.2"):
        chosen = [i for i, name in enumerate(names) if name.startswith(layer)]
        sets[f"bce ones, {layer} only"] = lambda b, chosen=chosen: b["signals"][:, bce, chosen]
    sets["bce ones, sum over the network"] = lambda b: np.logaddexp.reduce(
        b["signals"][:, bce].astype(np.float64), 1, keepdims=True
    )
    sets["logits (control)"] = lambda b: np.sort(b["logits"], 1)
    sets["h (control)"] = lambda b: b["features"]
    sets["image statistics (control)"] = lambda b: b["image"]
    return sets


def _last_layer_contrasts(blocks: Arrays) -> Rows:
    """All N contrasts of the last layer in closed form, in order of rank: no backward pass."""
    h, logits = torch.from_numpy(blocks["features"]), torch.from_numpy(blocks["logits"])
    norms = functional.contrast_sqnorm(h, logits, log=True)
    return norms.gather(1, logits.argsort(1, descending=True)).double().numpy()


def cross_fitted(clean: Rows, challenging: Rows) -> float:
    """AUROC of a logistic regression fitted on one half and tested on the other, and the reverse."""
    values = []
    for first in (0, 1):
        join = logistic(clean[first::2], challenging[first::2])
        values.append(auroc(join(clean[1 - first :: 2]), join(challenging[1 - first :: 2])))
    return float(np.mean(values))


def evaluate(subject: Subject) -> Found:
    """AUROC of every variant on every case, for one network."""
    network = subject.recipe.network
    right = subject.correct("test")

    def everything(case: str, part: str = "test") -> Arrays:
        return subject.blocks(case, part) | subject.gradients(case, part) | more_signals(subject, case, part)

    fit = everything("clean", "fit")
    clean = {name: values[right] for name, values in everything("clean").items()}
    cases = {short(case): everything(case) for case in CASES}
    found: Found = {}

    def record(method: str, score: Callable[[Arrays], Rows]) -> None:
        negative = score(clean)
        for case, blocks in cases.items():
            found[network, case, method] = auroc(negative, score(blocks))

    for name, read in feature_sets(subject).items():
        detector = UncertaintyDetector(log=False, contrasts=False)
        detector.fit(np.asarray(read(fit), np.float64))
        record(
            f"one-class: {name}", lambda b, d=detector, r=read: d.decision_function(np.asarray(r(b), float))
        )
        for case, blocks in cases.items():
            found[network, case, f"labelled: {name}"] = cross_fitted(
                np.asarray(read(clean), np.float64), np.asarray(read(blocks), np.float64)
            )
    variants = {name: detector for name, (_, detector) in subject.own.items()}
    default = variants[own.DEFAULT]
    variants[detectors.ONE_CLASS[0]] = detectors.one_class(subject)[1]
    for name, read_too, combine in (
        ("one-class, harmonic mean", (), "harmonic"),
        # Contrasts through the whole network and norms of three signals, two dozen passes, stand beside the default's.
        ("one-class and all contrasts", ("ranked",), "fisher"),
        ("one-class and all gradients", ("gradients",), "fisher"),
    ):
        detector = UncertaintyDetector(log=False, combine=combine)
        variants[name] = detector.fit(own.visible(default, fit) | {block: fit[block] for block in read_too})
    for name, detector in variants.items():
        record(name, lambda b, d=detector: own.scores(d, b))
    # Each part of the default detector by itself, already a two-sided p-value where that is its meaning.
    for part in default.explain(own.visible(default, clean)):
        record(f"part: {part}", lambda b, p=part: default.explain(own.visible(default, b))[p])
    for name, score in subject.published(PUBLISHED).items():
        record(name, score)
    return found


def write(options: Options, subjects: Sequence[Subject], found: Sequence[Found]) -> Page:
    """Whole detectors, then sets of features without and with labels."""
    rows = detection_rows(found)
    names = [short(case) for case in CASES]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sections = [
        (title, pivot(rows, names, [m for m in methods if belongs(m)]))
        for title, belongs in (
            ("## The default detector, its parts, and published one-class detectors", _is_whole),
            ("## One-class scores on each set of features", lambda m: m.startswith("one-class: ")),
            ("## Labelled, for each case by itself", lambda m: m.startswith("labelled: ")),
        )
    ]
    means = {
        kind: {
            m.partition(": ")[2]: float(np.mean([row["auroc"] for row in rows if row["method"] == m]))
            for m in methods
            if m.startswith(kind)
        }
        for kind in ("one-class: ", "labelled: ")
    }
    sets = list(means["labelled: "])
    axes = grouped_bars(
        {kind[:-2]: [values[name] for name in sets] for kind, values in means.items()},
        sets,
        label="mean AUROC over 16 cases",
        floor=0.4,
    )
    return Page(rows, sections, axes)


def _is_whole(method: str) -> bool:
    return not method.startswith(("one-class: ", "labelled: "))


TABLE = Table("ablation", "Ablation", ("cifar10", *STRANGERS["cifar10"]), residual_networks, evaluate, write)
