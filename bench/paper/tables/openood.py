"""Published detectors of other data sets under one protocol, near and far sets apart, with their prices.

The protocol is that of OpenOOD: near sets are CIFAR-100 and Tiny-ImageNet, far ones SVHN and Textures, all through the
same JPEG as the CIFAR-10 file. Nothing is chosen on them: hyper-parameters are those of the papers or of pytorch-ood,
and blocks are chosen on generated challenges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from bench import results_file
from bench.paper import detectors, own, published
from bench.paper.data import sets
from bench.paper.figures import price_front
from bench.paper.price import prices
from bench.paper.resampled import RESAMPLES, Scores, auroc, difference, interval, missed
from bench.paper.rows import Rows
from bench.paper.subject import BATCH, Subject, residual_networks
from bench.paper.table import Options, Page, Table
from bench.paper.train import accuracy
from fastgrad.blocks import Gradients
from fastgrad.detector.budget import Report

GROUPS: Mapping[str, tuple[str, ...]] = {"near": ("cifar100", "tinyimagenet"), "far": ("svhn", "textures")}
SETS = tuple(name for names in GROUPS.values() for name in names)
GREY, AGAINST_GREY = "grey cifar10 (control)", "svhn against grey cifar10"
#: OpenOOD v1.5 (Zhang et al. 2023, and the papers of NAC, fDBD and AdaSCALE): AUROC of near and far sets.
OPENOOD = {
    "CIFAR-10": {
        "NAC": (90.93, 94.60), "KNN": (90.64, 92.96), "fDBD": (90.42, 93.16), "ViM": (88.68, 93.48),
        "softmax": (88.03, 90.73), "GradNorm": (54.90, 57.55),
    },
    "ImageNet": {
        "AdaSCALE": (84.42, 97.27), "SCALE": (81.36, 96.53), "NAC": (74.43, 95.29), "softmax": (76.02, 85.23),
    },
}  # fmt: skip


def evaluate(subject: Subject) -> dict[str, Any]:
    """Every method's scores of the clean images and of every set, what budgets keep, what methods cost."""
    fitted = subject.own | {detectors.ONE_CLASS[0]: detectors.one_class(subject)}
    outputs = subject.published()
    methods = detectors.Methods(detectors.from_clean(subject) | outputs)
    images = _from_images(subject)

    def of_images(case: str) -> dict[str, Scores]:
        pictures = subject.images(case)
        return subject.kept(
            f"published 2/{case}", "test", lambda: {name: score(pictures) for name, score in images.items()}
        )

    paths = {"clean": "clean", GREY: "control/grey"} | {name: f"ood/{name}" for name in SETS}
    scores = {name: methods.scores(subject, path) | of_images(path) for name, path in paths.items()}
    x = subject.reading.x
    blocks = {name: values[: len(x)] for name, values in subject.blocks("clean").items()}
    gradients = subject.reading.extraction.of([Gradients()])
    lone = methods.blocks[detectors.ONE_CLASS[1]]
    live = {name: subject.reading.live(report, detector) for name, (report, detector) in fitted.items()} | {
        detectors.ONE_CLASS[1]: lambda: lone(subject.reading.blocks(x, gradients)),
        **{name: partial(score, x) for name, score in images.items()},
    }
    tested = sets.load(subject.options.data, subject.recipe.dataset, "test").labelled()
    after = prices(subject.model, x, {name: partial(score, blocks) for name, score in outputs.items()})
    return {
        "scores": scores,
        "prices": prices(subject.model, x, live) | {name: 1 + price for name, price in after.items()},
        "reports": {name: subject.own[name][0].to_json() for name in map(own.named, own.BUDGETS)},
        "accuracy": accuracy(subject.model, *tested),
        "tested": len(tested[1]),
    }


def _from_images(subject: Subject) -> dict[str, published.FromImages]:
    model, (images, labels) = subject.model, subject.clean("seen")
    movement = subject.kept(
        "movement", "fit", lambda: {"movement": published.movements(model, images[:500], BATCH)}
    )["movement"]
    return published.from_images(model, torch.from_numpy(movement), BATCH) | published.from_layers(
        model, images[:1000], labels[:1000], subject.seen, BATCH
    )


def write(options: Options, subjects: Sequence[Subject], found: Sequence[Mapping[str, Any]]) -> Page:
    """Methods by near and far sets, differences with intervals, each set, what the budgets keep, OpenOOD's figures."""
    methods = list(found[0]["scores"]["clean"])
    cells: dict[tuple[str, str, str], Scores] = {}
    rows: Rows = []
    for method in methods:
        of = [{case: values[method] for case, values in one["scores"].items()} for one in found]
        pairs = {name: ("clean", name) for name in (*SETS, GREY)} | {AGAINST_GREY: (GREY, "svhn")}
        for case, (clean, other) in pairs.items():
            for key, measure in (("auroc", auroc), ("missed", missed)):
                cells[method, case, key] = np.mean([measure(one[clean], one[other]) for one in of], 0)
        for group, names in GROUPS.items():
            for key in ("auroc", "missed"):
                cells[method, group, key] = np.mean([cells[method, name, key] for name in names], 0)
        cells[method, "all", "auroc"] = np.mean([cells[method, group, "auroc"] for group in GROUPS], 0)
        for case in pairs:
            row: dict[str, Any] = {"network": subjects[0].recipe.network, "case": case, "method": method}
            rows.append(row | _measured(cells, method, case) | {"seeds": len(found)})
    cost = {method: float(np.median([one["prices"][method] for one in found])) for method in methods}
    ordered = sorted(methods, key=lambda method: -cells[method, "all", "auroc"][0])
    for method in ordered:
        row = {"case": "near and far", "method": method, "passes": round(cost[method], 2)}
        for group in GROUPS:
            row |= {f"{group} {key}": value for key, value in _measured(cells, method, group).items()}
        rows.append(row)

    def shown(method: str, case: str, key: str) -> str:
        low, high = interval(cells[method, case, key])
        return f"{100 * cells[method, case, key][0]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    lines = [
        {"method": method, "passes": f"{cost[method]:.2f}"}
        | {
            f"{group}, {head}": shown(method, group, key)
            for group in GROUPS
            for head, key in (("AUROC", "auroc"), ("FPR", "missed"))
        }
        for method in ordered
    ]
    compared = []
    for method in ordered:
        if method != own.DEFAULT:
            line = {f"{own.DEFAULT} less": method}
            for group in GROUPS:
                less = cells[own.DEFAULT, group, "auroc"] - cells[method, group, "auroc"]
                line[group] = difference(100 * less, 1)
            compared.append(line)
    columns = (*SETS, GREY, AGAINST_GREY)
    each = [{"method": m} | {c: f"{100 * cells[m, c, 'auroc'][0]:.1f}" for c in columns} for m in ordered]
    kept = []
    for name in map(own.named, own.BUDGETS):
        for subject, one in zip(subjects, found, strict=True):
            report = Report.from_json(one["reports"][name])
            kept.append(
                {
                    "method": name,
                    "seed": subject.recipe.seed,
                    "kept": ", ".join(report.kept),
                    "worth": own.worths(report),
                }
            )
    elsewhere = [
        {"data": data, "method": method, "near, AUROC": f"{near:.2f}", "far, AUROC": f"{far:.2f}"}
        for data, figures in OPENOOD.items()
        for method, (near, far) in figures.items()
    ]
    right = ", ".join(f"{one['accuracy']:.1%}" for one in found)
    for subject, one in zip(subjects, found, strict=True):
        row = {"network": subject.recipe.network, "case": "clean", "method": "network"}
        rows.append(row | {"accuracy": round(one["accuracy"], 4), "images": one["tested"]})
    sections = [
        (
            f"Networks: {len(found)}, right on {right} of the {found[0]['tested']:,} test images of CIFAR-10; "
            f"{options.test} of them against {options.strangers} images of each set; means over the two sets of a "
            f"group, in hundredths, with 95 % intervals from {RESAMPLES} resamples of the images. *FPR*: share of "
            "other images that pass where 95 % of the clean ones pass. *passes*: processor time for "
            f"{BATCH} images, in forward passes of the network. Published detectors are fitted on images that the "
            "network was trained on (4,000; NAC and Gram 1,000, AdaSCALE 500), this package's on "
            f"{options.fit} that it was not, and on challenges generated from them.",
            results_file.table(lines),
        ),
        ("Differences of AUROC, with intervals; *none*: the interval holds zero.", results_file.table(compared)),
        ("AUROC on each set. The SVHN images at hand are grey: grey CIFAR-10 images are the control.",
         results_file.table(each)),
        ("What each budget keeps, and what each block was worth on generated challenges left out.",
         results_file.table(kept)),
        (
            "**Another protocol**, not to be compared row by row: figures given for OpenOOD v1.5, whose networks are "
            "trained longer, on files that did not pass through JPEG, with more other sets, and with hyper-parameters "
            "chosen on validation images of other sets.",
            results_file.table(elsewhere),
        ),
    ]  # fmt: skip
    points = {
        method: (cost[method], float(cells[method, "all", "auroc"][0]))
        for method in methods
        if method not in own.CONTROLS
    }
    return Page(rows, sections, price_front(points, own=[m for m in points if m.startswith("fastgrad")]))


def _measured(cells: Mapping[tuple[str, str, str], Scores], method: str, case: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("auroc", "missed"):
        cell = cells[method, case, key]
        found |= {key: round(float(cell[0]), 4), f"{key} interval": interval(cell)}
    return found


TABLE = Table(
    "openood", "Published detectors of other data sets", ("cifar10", *SETS), residual_networks, evaluate, write,
    networks=True,
)  # fmt: skip
