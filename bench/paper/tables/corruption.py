"""Corruption detection: 19 corruptions at five severities."""

from __future__ import annotations

from collections.abc import Sequence

from bench.paper import detectors, own
from bench.paper.data.corruptions import CORRUPTIONS, SEVERITIES
from bench.paper.figures import heatmap
from bench.paper.rows import Found, detection_rows, mean_rows, pivot, precision
from bench.paper.subject import Subject, both_networks
from bench.paper.table import Options, Page, Table

METHODS = (*own.NAMES, detectors.ONE_CLASS[0], "softmax", "energy", "GEN", "KNN", "ViM", "Mahalanobis")
CELLS = {
    f"{name}/{severity}": f"corruption/{name}/{severity}" for name in CORRUPTIONS for severity in SEVERITIES
}


def evaluate(subject: Subject) -> Found:
    """AUROC of every method on every corruption and severity, for one network."""
    mine = detectors.from_clean(subject, gradients=False)
    methods = detectors.Methods(mine | subject.published(METHODS))
    return methods.compare(subject, subject.recipe.network, CELLS)


def write(options: Options, subjects: Sequence[Subject], found: Sequence[Found]) -> Page:
    """Means over severities and over corruptions; the JSON has every cell."""
    rows = detection_rows(found)
    kinds = {name: [f"{name}/{severity}" for severity in SEVERITIES] for name in CORRUPTIONS}
    levels = {
        f"severity {severity}": [f"{name}/{severity}" for name in CORRUPTIONS] for severity in SEVERITIES
    }
    sections = []
    for network in dict.fromkeys(row["network"] for row in rows):
        here = [row for row in rows if row["network"] == network]
        sections += [
            (
                f"## {network}, mean over severities\n\n{precision(options.test, options.cell)}",
                pivot(mean_rows(here, kinds), CORRUPTIONS, METHODS),
            ),
            (f"## {network}, mean over corruptions", pivot(mean_rows(here, levels), list(levels), METHODS)),
        ]
    cells = {
        (row["case"], row["method"]): row["auroc"]
        for row in mean_rows(rows, {cell: [cell] for cell in CELLS})
    }
    matrix = [[cells[f"{name}/{severity}", own.DEFAULT] for severity in SEVERITIES] for name in CORRUPTIONS]
    axes = heatmap(
        matrix, CORRUPTIONS, [str(severity) for severity in SEVERITIES], label=f"AUROC of {own.DEFAULT}"
    )
    return Page(rows, sections, axes)


TABLE = Table(
    "corruption", "Corruption detection", ("cifar10",), both_networks, evaluate, write, networks=True
)
