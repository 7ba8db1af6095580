"""Adversarial detection: six attacks on both networks (``python -m bench.paper.adversarial``)."""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from bench.paper import detectors
from bench.paper.attacks import ATTACKS
from bench.paper.common import Options, detection_rows, finish, parallel, parse, pivot
from bench.paper.figures import grouped_bars
from bench.paper.subject import Subject
from bench.paper.train import Recipe, train_all
from fastgrad.metrics import auroc

#: AUROC of the published gradient detector (Lee et al. 2022), which is trained on labelled attacks.
PUBLISHED = {
    "resnet": (93.45, 96.19, 97.07, 95.82, 98.17, 90.15),
    "densenet": (96.83, 96.85, 97.05, 96.77, 98.53, 89.55),
}
MAGNITUDE = 0.0014
CLEAN_ONLY = (
    *detectors.VARIANTS,
    "fastgrad one-class",
    "softmax",
    "energy",
    "KNN",
    "ViM",
    "Mahalanobis V",
    "Mahalanobis P",
)
LABELLED = (
    "fastgrad H",
    "fastgrad labelled",
    "LID",
    "Mahalanobis FE",
    "Mahalanobis P+FE",
    "logits labelled",
    "h labelled",
    "image statistics labelled",
)
CONTROLS = {
    "logits labelled": lambda blocks: np.sort(blocks["logits"].astype(np.float64), 1),
    "h labelled": lambda blocks: blocks["features"].astype(np.float64),
    "image statistics labelled": lambda blocks: blocks["image"].astype(np.float64),
}
Found = dict[tuple[str, str, str], float]


def compressed(attack: str) -> str:
    """The case of an attack whose images went through JPEG once more."""
    return f"{attack} after JPEG (control)"


def evaluate(task: tuple[Recipe, Options]) -> tuple[Found, dict[str, float]]:
    """AUROC of every method on every attack for one network; how many attacks still fool it after JPEG."""
    recipe, options = task
    start = time.perf_counter()
    subject = Subject(recipe, options)
    right = {part: subject.correct(part) for part in ("test", "fit")}
    clean = {
        part: {k: v[right[part]] for k, v in subject.blocks("clean", part).items()}
        for part in ("test", "fit")
    }
    images = {part: subject.clean(part)[0][torch.from_numpy(right[part])] for part in ("test", "fit")}
    images["fit"] = images["fit"][: options.learn]
    images["test"] = images["test"][: 2 * options.case]
    clean["test"] = {k: v[: 2 * options.case] for k, v in clean["test"].items()}
    fitted = detectors.from_clean(subject)
    plain = detectors.from_outputs(subject)
    layers = detectors.MahalanobisLayers(subject)
    bare = {part: layers.distances(images[part], 0.0) for part in images}
    moved = {part: layers.distances(images[part], MAGNITUDE) for part in images}

    def stages(values: torch.Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return [stage.numpy() for stage in subject.model.stage_features(values)]

    reference = stages(subject.clean("seen")[0][:1000])
    dimension = {part: detectors.local_dimensionality(reference, stages(images[part])) for part in images}
    found: Found = {}
    fooled: dict[str, float] = {}
    truth = subject.clean("test")[1].numpy()[right["test"]]
    for name in ATTACKS:
        case = f"attack/{name}"
        blocks = {part: subject.blocks(case, part) for part in ("test", "fit")}
        attacked = {part: subject.images(case, part) for part in ("test", "fit")}

        def record(method: str, negative: np.ndarray, positive: np.ndarray, case: str = name) -> None:
            found[recipe.network, case, method] = auroc(negative, positive)

        again = subject.blocks(f"compressed/{name}")
        fooled[name] = float((again["logits"].argmax(1) != truth[: len(again["logits"])]).mean())
        for method, detector in fitted.items():
            known = detectors.scores(detector, clean["test"])
            record(method, known, detectors.scores(detector, blocks["test"]))
            record(method, known, detectors.scores(detector, again), compressed(name))
        expert = detectors.labelled(subject, [case])
        for method, score in (("fastgrad labelled", detectors.scores), ("fastgrad H", detectors.h_alone)):
            record(method, *(score(expert, b) for b in (clean["test"], blocks["test"])))
        for method, score in plain.items():
            record(method, score(clean["test"]), score(blocks["test"]))
            record(method, score(clean["test"]), score(again), compressed(name))
        for suffix, usual, magnitude in (("", bare, 0.0), ("P", moved, MAGNITUDE)):
            distance = {part: layers.distances(attacked[part], magnitude) for part in attacked}
            if suffix:
                record("Mahalanobis P", usual["test"][:, -1], distance["test"][:, -1])
            join = detectors.logistic(usual["fit"], distance["fit"])
            record(f"Mahalanobis {'P+' if suffix else ''}FE", join(usual["test"]), join(distance["test"]))
        lid = {part: detectors.local_dimensionality(reference, stages(attacked[part])) for part in attacked}
        join = detectors.logistic(dimension["fit"], lid["fit"])
        record("LID", join(dimension["test"]), join(lid["test"]))
        # Controls: what labels alone buy, without any gradient.
        for method, read in CONTROLS.items():
            join = detectors.logistic(read(clean["fit"]), read(blocks["fit"]))
            record(method, join(read(clean["test"])), join(read(blocks["test"])))
    print(f"adversarial {recipe.file()}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found, fooled


def run(options: Options) -> None:
    """Make the table."""
    recipes = [
        Recipe(network=network, seed=seed, epochs=options.epochs)
        for seed in range(options.seeds)
        for network in ("resnet", "densenet")
    ]
    train_all(recipes, options.data, options.cache, options.workers)
    found = parallel(evaluate, [(recipe, options) for recipe in recipes], options.workers)
    rows = detection_rows([mapping for mapping, _ in found])
    sections = []
    for network, published in PUBLISHED.items():
        own = [row for row in rows if row["network"] == network]
        line = ", ".join(f"{name} {value}" for name, value in zip(ATTACKS, published, strict=True))
        mean = f"{np.mean(published):.1f}"
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
                f"of the attack; still misclassified: {_shares(recipes, found, network)}.",
                pivot(own, [compressed(name) for name in ATTACKS], CLEAN_ONLY),
            ),
        ]
    methods = ("fastgrad H", "fastgrad", "Mahalanobis P+FE", "LID", "Mahalanobis V", "softmax")
    value = {(row["network"], row["case"], row["method"]): row for row in rows}
    groups = [(network, name) for network in PUBLISHED for name in ATTACKS]
    axes = grouped_bars(
        {m: [value[(*group, m)]["auroc"] for group in groups] for m in methods},
        [f"{name}\n{network}" for network, name in groups],
        errors={m: [value[(*group, m)]["spread"] for group in groups] for m in methods},
    )
    finish(options, "adversarial", "Adversarial detection", rows, sections, axes)


def _shares(recipes: list[Recipe], found: list[tuple[Found, dict[str, float]]], network: str) -> str:
    """Mean share of attacked images that are still misclassified after compression, by attack."""
    own = [shares for recipe, (_, shares) in zip(recipes, found, strict=True) if recipe.network == network]
    return ", ".join(f"{name} {np.mean([shares[name] for shares in own]):.0%}" for name in ATTACKS)


if __name__ == "__main__":
    run(parse(__doc__ or ""))
