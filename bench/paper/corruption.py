"""Corruption detection: 19 corruptions at five severities (``python -m bench.paper.corruption``)."""

from __future__ import annotations

import sys
import time

import numpy as np

from bench.paper import detectors
from bench.paper.common import Options, detection_rows, finish, parallel, parse, pivot
from bench.paper.corruptions import CORRUPTIONS, SEVERITIES
from bench.paper.figures import heatmap
from bench.paper.subject import Subject
from bench.paper.train import Recipe, train_all
from fastgrad.metrics import auroc

METHODS = (*detectors.VARIANTS, "fastgrad one-class", "softmax", "energy", "KNN", "ViM", "Mahalanobis V")


def evaluate(task: tuple[Recipe, Options]) -> dict[tuple[str, str, str], float]:
    """AUROC of every method on every corruption and severity, for one network."""
    recipe, options = task
    start = time.perf_counter()
    subject = Subject(recipe, options)
    fitted = detectors.from_clean(subject)
    outputs = detectors.from_outputs(subject)

    def scores(case: str) -> dict[str, np.ndarray]:
        blocks = subject.blocks(case)
        return {name: detectors.scores(detector, blocks) for name, detector in fitted.items()} | {
            name: score(blocks) for name, score in outputs.items()
        }

    clean = scores("clean")
    found: dict[tuple[str, str, str], float] = {}
    for corruption in CORRUPTIONS:
        for severity in SEVERITIES:
            values = scores(f"corruption/{corruption}/{severity}")
            for method, positive in values.items():
                found[recipe.network, f"{corruption}/{severity}", method] = auroc(clean[method], positive)
    print(f"corruption {recipe.file()}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def run(options: Options) -> None:
    """Make the table."""
    recipes = [
        Recipe(network=network, seed=seed, epochs=options.epochs)
        for seed in range(options.seeds)
        for network in ("resnet", "densenet")
    ]
    train_all(recipes, options.data, options.cache, options.workers)
    rows = detection_rows(parallel(evaluate, [(recipe, options) for recipe in recipes], options.workers))
    sections = []
    for network in dict.fromkeys(row["network"] for row in rows):
        # One column per corruption, the mean over its severities; the JSON has every cell.
        means = [
            {
                "case": corruption,
                "method": method,
                "auroc": float(np.mean([row["auroc"] for row in cells])),
                "spread": float(np.mean([row["spread"] for row in cells])),
            }
            for corruption in CORRUPTIONS
            for method in METHODS
            if (cells := _cells(rows, network, method, corruption))
        ]
        sections.append((f"## {network}, mean over severities", pivot(means, CORRUPTIONS, METHODS)))
        levels = [
            {
                "case": f"severity {severity}",
                "method": method,
                "auroc": float(np.mean([row["auroc"] for row in cells])),
                "spread": float(np.mean([row["spread"] for row in cells])),
            }
            for severity in SEVERITIES
            for method in METHODS
            if (cells := _cells(rows, network, method, f"/{severity}"))
        ]
        names = [f"severity {severity}" for severity in SEVERITIES]
        sections.append((f"## {network}, mean over corruptions", pivot(levels, names, METHODS)))
    matrix = [
        [
            np.mean([row["auroc"] for row in _cells(rows, None, "fastgrad", f"{corruption}/{severity}")])
            for severity in SEVERITIES
        ]
        for corruption in CORRUPTIONS
    ]
    axes = heatmap(matrix, CORRUPTIONS, [str(severity) for severity in SEVERITIES], label="AUROC of fastgrad")
    finish(options, "corruption", "Corruption detection", rows, sections, axes)


def _cells(rows: list[dict], network: str | None, method: str, case: str) -> list[dict]:
    """The rows of a method whose case begins or ends with ``case``."""
    return [
        row
        for row in rows
        if network in (None, row["network"])
        and row["method"] == method
        and (row["case"].rpartition("/")[0] == case or row["case"].endswith(case))
    ]


if __name__ == "__main__":
    run(parse(__doc__ or ""))
