"""Out-of-distribution detection: digits and colour images (``python -m bench.paper.ood``)."""

from __future__ import annotations

import sys
import time

import numpy as np

from bench.paper import detectors
from bench.paper.common import Options, detection_rows, finish, parallel, parse, pivot
from bench.paper.figures import grouped_bars
from bench.paper.subject import Subject
from bench.paper.train import Recipe, train_all
from fastgrad.metrics import auroc

STRANGERS = {
    "cifar10": ("cifar100", "tinyimagenet", "svhn", "textures"),
    "mnist": ("scenes", "fashion", "letters", "kuzushiji", "omniglot"),
}
METHODS = (
    *detectors.VARIANTS, "fastgrad one-class",
    "softmax", "energy", "KNN", "ViM", "Mahalanobis V", "ODIN", "GradNorm",
)  # fmt: skip
#: SVHN is grey in the collection at hand; grey CIFAR-10 says what the missing colour alone gives away.
CONTROL, AGAINST_CONTROL = "grey cifar10 (control)", "svhn against grey cifar10"


def evaluate(task: tuple[Recipe, Options]) -> dict[tuple[str, str, str], float]:
    """AUROC of every method on every other set, for one network."""
    recipe, options = task
    start = time.perf_counter()
    subject = Subject(recipe, options)
    fitted = detectors.from_clean(subject)
    outputs, inputs = detectors.from_outputs(subject), detectors.from_images(subject)

    def scores(case: str) -> dict[str, np.ndarray]:
        blocks, images = subject.blocks(case), subject.images(case)
        return (
            {name: detectors.scores(detector, blocks) for name, detector in fitted.items()}
            | {name: score(blocks) for name, score in outputs.items()}
            | {name: score(images) for name, score in inputs.items()}
        )

    network, clean = f"{recipe.dataset} {recipe.network}", scores("clean")
    found: dict[tuple[str, str, str], float] = {}
    cases = {name: scores(f"ood/{name}") for name in STRANGERS[recipe.dataset]}
    if recipe.dataset == "cifar10":
        cases[CONTROL] = scores("control/grey")
        for method, values in cases["svhn"].items():
            found[network, AGAINST_CONTROL, method] = auroc(cases[CONTROL][method], values)
    for case, methods in cases.items():
        for method, values in methods.items():
            found[network, case, method] = auroc(clean[method], values)
    print(f"ood {recipe.file()}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def run(options: Options) -> None:
    """Make the table."""
    digits = 2 if options.quick else 10
    recipes = [Recipe("mnist", "resnet", seed, epochs=digits) for seed in range(options.seeds)]
    recipes += [
        Recipe(network=network, seed=seed, epochs=options.epochs)
        for seed in range(options.seeds)
        for network in ("resnet", "densenet")
    ]
    train_all(recipes, options.data, options.cache, options.workers)
    rows = detection_rows(parallel(evaluate, [(recipe, options) for recipe in recipes], options.workers))
    sections = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        sections.append((f"## {network}", pivot(own, STRANGERS[network.split()[0]], METHODS)))
        if network.startswith("cifar10"):
            text = (
                "The SVHN images are grey. Control: grey CIFAR-10 test images against colour ones, and SVHN "
                "against them."
            )
            sections.append((text, pivot(own, (CONTROL, AGAINST_CONTROL), METHODS)))
    value = {(row["network"], row["case"], row["method"]): row for row in rows}
    groups = [
        (network, case)
        for network in dict.fromkeys(row["network"] for row in rows)
        for case in STRANGERS[network.split()[0]]
    ]
    shown = ("fastgrad", "fastgrad one-class", "KNN", "ViM", "energy", "softmax", "GradNorm")
    axes = grouped_bars(
        {m: [value[(*group, m)]["auroc"] for group in groups] for m in shown},
        [f"{case}\n{network}" for network, case in groups],
        errors={m: [value[(*group, m)]["spread"] for group in groups] for m in shown},
    )
    finish(options, "ood", "Out-of-distribution detection", rows, sections, axes)


if __name__ == "__main__":
    run(parse(__doc__ or ""))
