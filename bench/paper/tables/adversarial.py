"""Adversarial detection: six attacks on both networks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from bench.paper import detectors, labelled, own
from bench.paper.cache import Arrays
from bench.paper.data.attacks import ATTACKS
from bench.paper.figures import detection_bars
from bench.paper.rows import Found, detection_rows, pivot, precision
from bench.paper.subject import Subject, both_networks
from bench.paper.table import Options, Page, Table
from fastgrad.metrics import auroc

#: AUROC of the published gradient detector (Lee et al. 2022), which is trained on labelled attacks.
PUBLISHED = {
    "resnet": (93.45, 96.19, 97.07, 95.82, 98.17, 90.15),
    "densenet": (96.83, 96.85, 97.05, 96.77, 98.53, 89.55),
}
MAGNITUDE = 0.0014
OUTPUTS = ("softmax", "energy", "KNN", "ViM", "Mahalanobis")
CLEAN_ONLY = (*own.NAMES, *detectors.ONE_CLASS, *OUTPUTS)
#: What H reads where it is trained on labelled attacks: the published detector's norms, and others to compare with.
READ: dict[str, tuple[str, ...]] = {
    "gradients": ("gradients",),
    "bias gradients": ("bias_gradients",),
    "activations": ("activations",),
    "logits": ("logits",),
    "h": ("features",),
    "image statistics": ("image",),
    "all without gradients": ("logits", "features", "image", "activations"),
    "all with gradients": ("logits", "features", "image", "activations", "bias_gradients", "gradients"),
}
BUDGETED = "fastgrad, budget 1.2, labelled"
LABELLED = (BUDGETED, *(f"H on {name}" for name in READ), "LID", "Mahalanobis FE", "Mahalanobis P+FE")


def compressed(attack: str) -> str:
    """The case of an attack whose images went through JPEG once more."""
    return f"{attack} after JPEG (control)"


def evaluate(subject: Subject) -> tuple[Found, dict[str, float]]:
    """AUROC of every method on every attack for one network; how many attacks still fool it after JPEG."""
    network, options = subject.recipe.network, subject.options
    kept = {part: np.flatnonzero(subject.correct(part)) for part in ("test", "fit")}
    kept["test"] = kept["test"][: 2 * options.case]
    plain = detectors.Methods(detectors.from_clean(subject) | subject.published(OUTPUTS))
    cases = {name: f"attack/{name}" for name in ATTACKS}
    again = {compressed(name): f"compressed/{name}" for name in ATTACKS}
    found = plain.compare(subject, network, cases | again, keep=kept["test"])
    truth = subject.clean("test")[1].numpy()[kept["test"]]
    fooled = {}
    for name in ATTACKS:
        predicted = subject.blocks(f"compressed/{name}")["logits"].argmax(1)
        fooled[name] = float((predicted != truth[: len(predicted)]).mean())
    return found | _labelled(subject, kept), fooled


def _labelled(subject: Subject, kept: dict[str, np.ndarray]) -> Found:
    """AUROC of the methods that are trained on clean and attacked images of the part ``fit``."""

    def everything(case: str, part: str) -> Arrays:
        return subject.blocks(case, part) | subject.gradients(case, part)

    clean = {name: values[kept["test"]] for name, values in everything("clean", "test").items()}
    images = {part: subject.clean(part)[0][torch.from_numpy(places)] for part, places in kept.items()}
    images["fit"] = images["fit"][: subject.options.learn]
    layers = labelled.MahalanobisLayers(subject)
    distances = {
        size: {part: layers.distances(pictures, size) for part, pictures in images.items()}
        for size in (0.0, MAGNITUDE)
    }

    def stages(values: torch.Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return [stage.numpy() for stage in subject.model.stage_features(values)]

    reference = stages(subject.clean("seen")[0][:1000])
    lid = partial(labelled.local_dimensionality, reference)
    dimension = {part: lid(stages(pictures)) for part, pictures in images.items()}
    found: Found = {}
    for name in ATTACKS:
        case = f"attack/{name}"
        attacked = {part: subject.images(case, part) for part in kept}

        def record(method: str, negative: np.ndarray, positive: np.ndarray, name: str = name) -> None:
            found[subject.recipe.network, name, method] = auroc(negative, positive)

        def learn(method: str, negative: dict[str, np.ndarray], positive: dict[str, np.ndarray]) -> None:
            join = labelled.logistic(negative["fit"], positive["fit"])
            record(method, join(negative["test"]), join(positive["test"]))

        challenges = subject.samples.clean.beside(subject.blocks(case, "fit"), case)
        _, budgeted = subject.reading.fit(
            subject.reading.candidates(own.BUDGETS[0]), challenges, labelled=True
        )
        other = everything(case, "test")
        record(BUDGETED, own.scores(budgeted, clean), own.scores(budgeted, other))
        for method, names in READ.items():
            h = detectors.labelled(subject, case, partial(everything, part="fit"), names)
            record(f"H on {method}", detectors.h_alone(h, clean), detectors.h_alone(h, other))
        for size, usual in distances.items():
            moved = {part: layers.distances(pictures, size) for part, pictures in attacked.items()}
            learn("Mahalanobis P+FE" if size else "Mahalanobis FE", usual, moved)
        learn("LID", dimension, {part: lid(stages(pictures)) for part, pictures in attacked.items()})
    return found


def write(
    options: Options, subjects: Sequence[Subject], found: Sequence[tuple[Found, dict[str, float]]]
) -> Page:
    """For each network: from clean data, from labelled attacks, and after compression."""
    rows = detection_rows([mapping for mapping, _ in found])
    sections = []
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for network in networks:
        here = [row for row in rows if row["network"] == network]
        values = next(values for name, values in PUBLISHED.items() if network.startswith(name))
        line = ", ".join(f"{name} {value}" for name, value in zip(ATTACKS, values, strict=True))
        mean = f"{np.mean(values):.1f}"
        text = (
            f"## {network}\n\nPublished gradient detector, trained on labelled attacks: {line}; mean {mean}."
        )
        sections += [
            (
                f"{text}\n\nFrom clean data alone, all of it images that the network classifies rightly. "
                + precision(2 * options.case, options.case),
                pivot(here, ATTACKS, CLEAN_ONLY),
            ),
            (
                f"Trained on {options.learn} images of the same attack (the published protocol, with far fewer "
                "images). *H on ...*: the same classifier on different blocks, without one-class scores beside it; "
                "*gradients*: the squared norms of every parameter's gradient, which the published detector reads.",
                pivot(here, ATTACKS, LABELLED),
            ),
            (
                "Control: the same attacked images once more through JPEG (quality 75), against clean images "
                "as they are. Compression removes the added noise that image statistics see, and with it part "
                f"of the attack; still misclassified: {_shares(subjects, found, network)}.",
                pivot(here, [compressed(name) for name in ATTACKS], CLEAN_ONLY),
            ),
        ]
    shown = ("H on gradients", own.DEFAULT, "H on activations", "H on image statistics", "LID", "softmax")
    groups = [(network, name) for network in networks for name in ATTACKS]
    return Page(rows, sections, detection_bars(rows, groups, shown))


def _shares(
    subjects: Sequence[Subject], found: Sequence[tuple[Found, dict[str, float]]], network: str
) -> str:
    """Mean share of attacked images that are still misclassified after compression, by attack."""
    here = [shares for s, (_, shares) in zip(subjects, found, strict=True) if s.recipe.network == network]
    return ", ".join(f"{name} {np.mean([shares[name] for shares in here]):.0%}" for name in ATTACKS)


TABLE = Table(
    "adversarial", "Adversarial detection", ("cifar10",), both_networks, evaluate, write, networks=True
)
