"""Transfer: trained on one challenge, tested on every other.

Cases are ``trained on > tested on``. Every detector sees clean features and those of one challenge, with labels.
``fastgrad`` has the one-class scores beside H; ``H alone`` has not; ``one-class`` was trained on no challenge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from bench import results_file
from bench.paper import detectors, own
from bench.paper.cases import CASES, STRANGERS, short
from bench.paper.figures import heatmap
from bench.paper.published import FromBlocks
from bench.paper.rows import Found, detection_rows
from bench.paper.subject import Subject, residual_networks
from bench.paper.table import Options, Page, Table
from fastgrad.metrics import auroc

#: How far below the one-class detector a labelled one may fall.
TOLERANCE = 0.03


def evaluate(subject: Subject) -> Found:
    """AUROC of every detector on every case, for one network."""
    network, right = subject.recipe.network, subject.correct("test")
    clean = {name: values[right] for name, values in subject.blocks("clean").items()}
    everything = {short(case): subject.blocks(case) for case in CASES}
    found: Found = {}

    def record(trained: str, method: str, score: FromBlocks) -> None:
        reference = score(clean)
        for tested, blocks in everything.items():
            found[network, f"{trained} > {tested}", method] = auroc(reference, score(blocks))

    report, lone = detectors.one_class(subject)
    record("nothing", "one-class", partial(own.scores, lone))
    for trained in CASES:
        detector = detectors.labelled(subject, trained, partial(subject.blocks, part="fit"), report.kept)
        record(short(trained), "fastgrad", partial(own.scores, detector))
        record(short(trained), "H alone", partial(detectors.h_alone, detector))
    return found


def write(options: Options, subjects: Sequence[Subject], found: Sequence[Found]) -> Page:
    """A matrix for the detector with one-class scores and one without."""
    rows = detection_rows(found)
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
        sections.append((text, results_file.table(lines)))
    axes = heatmap(
        np.vstack([matrices["fastgrad"], lone]),
        [*names, "nothing (one-class)"],
        names,
        label="AUROC of fastgrad, trained on the row",
    )
    return Page(rows, sections, axes)


TABLE = Table(
    "transfer",
    "Transfer between challenges",
    ("cifar10", *STRANGERS["cifar10"]),
    residual_networks,
    evaluate,
    write,
)
