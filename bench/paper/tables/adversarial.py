"""Adversarial detection: six attacks on both networks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from bench.paper import detectors, published
from bench.paper.data.attacks import ATTACKS
from bench.paper.figures import detection_bars
from bench.paper.rows import Found, detection_rows, pivot
from bench.paper.subject import Subject, both_networks
from bench.paper.table import Options, Page, Table
from fastgrad.metrics import auroc

#: AUROC of the published gradient detector (Lee et al. 2022), which is trained on labelled attacks.
PUBLISHED = {
    "resnet": (93.45, 96.19, 97.07, 95.82, 98.17, 90.15),
    "densenet": (96.83, 96.85, 97.05, 96.77, 98.53, 89.55),
}
MAGNITUDE = 0.0014
CLEAN_ONLY = (
    *detectors.VARIANTS, "fastgrad one-class", "softmax", "energy", "KNN", "ViM", "Mahalanobis V", "Mahalanobis P",
)  # fmt: skip
LABELLED = (
    "fastgrad H", "fastgrad labelled", "LID", "Mahalanobis FE", "Mahalanobis P+FE", "logits labelled", "h labelled",
    "image statistics labelled",
)  # fmt: skip
CONTROLS = {
    "logits labelled": lambda blocks: np.sort(blocks["logits"].astype(np.float64), 1),
    "h labelled": lambda blocks: blocks["features"].astype(np.float64),
    "image statistics labelled": lambda blocks: blocks["image"].astype(np.float64),
}


def compressed(attack: str) -> str:
    """The case of an attack whose images went through JPEG once more."""
    return f"{attack} after JPEG (control)"


def evaluate(subject: Subject) -> tuple[Found, dict[str, float]]:
    """AUROC of every method on every attack for one network; how many attacks still fool it after JPEG."""
    network, options = subject.recipe.network, subject.options
    kept = {part: np.flatnonzero(subject.correct(part)) for part in ("test", "fit")}
    kept["test"] = kept["test"][: 2 * options.case]
    plain = detectors.Methods(detectors.from_clean(subject) | published.from_outputs(subject))
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
    """AUROC of the methods that are trained on clean and attacked images of the part ``fit``, and of Mahalanobis P."""
    clean = {
        part: {name: values[places] for name, values in subject.blocks("clean", part).items()}
        for part, places in kept.items()
    }
    images = {part: subject.clean(part)[0][torch.from_numpy(places)] for part, places in kept.items()}
    images["fit"] = images["fit"][: subject.options.learn]
    layers = published.MahalanobisLayers(subject)
    distances = {
        size: {part: layers.distances(pictures, size) for part, pictures in images.items()}
        for size in (0.0, MAGNITUDE)
    }

    def stages(values: torch.Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return [stage.numpy() for stage in subject.model.stage_features(values)]

    reference = stages(subject.clean("seen")[0][:1000])
    lid = partial(published.local_dimensionality, reference)
    dimension = {part: lid(stages(pictures)) for part, pictures in images.items()}
    found: Found = {}
    for name in ATTACKS:
        case = f"attack/{name}"
        blocks = {part: subject.blocks(case, part) for part in kept}
        attacked = {part: subject.images(case, part) for part in kept}

        def record(method: str, negative: np.ndarray, positive: np.ndarray, name: str = name) -> None:
            found[subject.recipe.network, name, method] = auroc(negative, positive)

        def learn(method: str, negative: dict[str, np.ndarray], positive: dict[str, np.ndarray]) -> None:
            join = published.logistic(negative["fit"], positive["fit"])
            record(method, join(negative["test"]), join(positive["test"]))

        expert = detectors.labelled(subject, [case])
        for method, score in (("fastgrad labelled", detectors.scores), ("fastgrad H", detectors.h_alone)):
            record(method, score(expert, clean["test"]), score(expert, blocks["test"]))
        for size, usual in distances.items():
            moved = {part: layers.distances(pictures, size) for part, pictures in attacked.items()}
            if size:
                record("Mahalanobis P", usual["test"][:, -1], moved["test"][:, -1])
            learn("Mahalanobis P+FE" if size else "Mahalanobis FE", usual, moved)
        learn("LID", dimension, {part: lid(stages(pictures)) for part, pictures in attacked.items()})
        # Controls: what labels alone buy, without any gradient.
        for method, read in CONTROLS.items():
            learn(method, *({part: read(rows) for part, rows in side.items()} for side in (clean, blocks)))
    return found


def write(
    options: Options, subjects: Sequence[Subject], found: Sequence[tuple[Found, dict[str, float]]]
) -> Page:
    """For each network: from clean data, from labelled attacks, and after compression."""
    rows = detection_rows([mapping for mapping, _ in found])
    sections = []
    for network, values in PUBLISHED.items():
        own = [row for row in rows if row["network"] == network]
        line = ", ".join(f"{name} {value}" for name, value in zip(ATTACKS, values, strict=True))
        mean = f"{np.mean(values):.1f}"
        text = (
            f"## {network}\n\nPublished gradient detector, trained on labelled attacks: {line}; mean {mean}."
        )
        sections += [
            (text + "\n\nFrom clean data alone:", pivot(own, ATTACKS, CLEAN_ONLY)),
            (
                f"Trained on {options.learn} images of the same attack (the published protocol, with far fewer "
                "images):",
                pivot(own, ATTACKS, LABELLED),
            ),
            (
                "Control: the same attacked images once more through JPEG (quality 75), against clean images "
                "as they are. Compression removes the added noise that image statistics see, and with it part "
                f"of the attack; still misclassified: {_shares(subjects, found, network)}.",
                pivot(own, [compressed(name) for name in ATTACKS], CLEAN_ONLY[:-1]),
            ),
        ]
    shown = ("fastgrad H", "fastgrad", "Mahalanobis P+FE", "LID", "Mahalanobis V", "softmax")
    groups = [(network, name) for network in PUBLISHED for name in ATTACKS]
    return Page(rows, sections, detection_bars(rows, groups, shown))


def _shares(
    subjects: Sequence[Subject], found: Sequence[tuple[Found, dict[str, float]]], network: str
) -> str:
    """Mean share of attacked images that are still misclassified after compression, by attack."""
    own = [shares for s, (_, shares) in zip(subjects, found, strict=True) if s.recipe.network == network]
    return ", ".join(f"{name} {np.mean([shares[name] for shares in own]):.0%}" for name in ATTACKS)


TABLE = Table("adversarial", "Adversarial detection", ("cifar10",), both_networks, evaluate, write)
