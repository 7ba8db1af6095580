"""Transfer: trained on one challenge, tested on every other (``python -m bench.paper.transfer``).

Cases are ``trained on > tested on``. Every detector sees clean features and those of one challenge, with labels.
``fastgrad`` has the one-class scores beside H; ``H alone`` has not; ``one-class`` was trained on no challenge.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from bench import results_file
from bench.paper import detectors
from bench.paper.attacks import ATTACKS
from bench.paper.common import Options, detection_rows, finish, parallel, parse
from bench.paper.figures import heatmap
from bench.paper.ood import STRANGERS
from bench.paper.subject import Subject
from bench.paper.train import Recipe, train_all
from fastgrad.metrics import auroc

CASES = (
    *(f"attack/{name}" for name in ATTACKS),
    *(f"ood/{name}" for name in STRANGERS["cifar10"]),
    *(
        f"corruption/{name}/3"
        for name in ("gaussian_noise", "defocus_blur", "fog", "brightness", "contrast", "jpeg_compression")
    ),
)
#: How far below the one-class detector a labelled one may fall.
TOLERANCE = 0.03


def short(case: str) -> str:
    """A case's name without its kind."""
    return case.split("/")[1]


def evaluate(task: tuple[Recipe, Options]) -> dict[tuple[str, str, str], float]:
    """AUROC of every detector on every case, for one network."""
    recipe, options = task
    start = time.perf_counter()
    subject = Subject(recipe, options)
    clean = {name: values[subject.correct("test")] for name, values in subject.blocks("clean").items()}
    everything = {case: subject.blocks(case) for case in CASES}
    found: dict[tuple[str, str, str], float] = {}
    lone = detectors.one_class(subject)
    reference = detectors.scores(lone, clean)
    for tested in CASES:
        value = auroc(reference, detectors.scores(lone, everything[tested]))
        found[recipe.network, f"nothing > {short(tested)}", "one-class"] = value
    for trained in CASES:
        detector = detectors.labelled(subject, [trained])
        for method, score in (("fastgrad", detectors.scores), ("H alone", detectors.h_alone)):
            reference = score(detector, clean)
            for tested in CASES:
                case = f"{short(trained)} > {short(tested)}"
                found[recipe.network, case, method] = auroc(reference, score(detector, everything[tested]))
    print(f"transfer {recipe.file()}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def run(options: Options) -> None:
    """Make the table."""
    recipes = [Recipe(seed=seed, epochs=options.epochs) for seed in range(options.seeds)]
    train_all(recipes, options.data, options.cache, options.workers)
    rows = detection_rows(parallel(evaluate, [(recipe, options) for recipe in recipes], options.workers))
    value = {(row["case"], row["method"]): row["auroc"] for row in rows}
    names = [short(case) for case in CASES]
    lone = np.array([value[f"nothing > {name}", "one-class"] for name in names])
    sections, matrices = [], {}
    for method in ("fastgrad", "H alone"):
        matrix = np.array([[value[f"{a} > {b}", method] for b in names] for a in names])
        matrices[method] = matrix
        lines = [
            {"trained on": name} | {b: f"{100 * v:.0f}" for b, v in zip(names, line, strict=True)}
            for name, line in zip(names, matrix, strict=True)
        ]
        lines.append(
            {"trained on": "nothing (one-class)"}
            | {b: f"{100 * v:.0f}" for b, v in zip(names, lone, strict=True)}
        )
        below = matrix - lone
        a, b = np.unravel_index(below.argmin(), below.shape)
        text = (
            f"## {method}\n\nMean {matrix.mean():.3f} (one-class {lone.mean():.3f}), worst {matrix.min():.3f}. "
            f"{int((below < -TOLERANCE).sum())} of {below.size} cells lie more than {TOLERANCE} below the one-class "
            f"detector, the furthest by {-below.min():.3f} ({names[a]} > {names[b]})."
        )
        sections.append((text, results_file.table(lines, {k: k for k in ("trained on", *names)})))
    axes = heatmap(
        np.vstack([matrices["fastgrad"], lone]),
        [*names, "nothing (one-class)"],
        names,
        label="AUROC of fastgrad, trained on the row",
    )
    finish(options, "transfer", "Transfer between challenges", rows, sections, axes)


if __name__ == "__main__":
    run(parse(__doc__ or ""))
