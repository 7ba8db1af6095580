"""Photographs and a network of published size: budgets, controls and published detectors on cases nobody trained on.

EfficientNet-Lite0, three draws of the photographs. Detectors see clean photographs and, those of this package,
challenges generated from them; the cases are for the test alone. Which blocks a budget keeps is chosen on generated
challenges.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.harness import results_file
from bench.paper import photograph_detectors as published
from bench.paper.draws import AFTER, CASES, DRAWS, FOREIGN, STRANGERS, Draw
from bench.paper.figures import grouped_bars
from bench.paper.photograph_features import Photographs
from bench.paper.rows import Rows
from bench.paper.table import Options, Page, Table
from fastgrad import UncertaintyDetector
from fastgrad.budget import Candidates, Report

Scores = NDArray[np.float64]
#: Kinds of case, and the cases that earlier figures of this data were given for.
GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(name for name, own in CASES.items() if own == group) for group in dict.fromkeys(CASES.values())
} | {
    "first 15": (
        "FGSM 2/255", "PGD 2/255", "PGD 8/255", "DeepFool", "PGD 8/255" + AFTER, "textures", "CIFAR-100",
        "grey scenes", "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "brightness", "contrast",
        "jpeg_compression",
    ),
    "second 19": (
        "FGSM 2/255", "PGD 8/255", "FGSM 2/255" + AFTER, "PGD 8/255" + AFTER, "BIM 4/255" + AFTER, *STRANGERS,
        *FOREIGN, "gaussian_noise", "defocus_blur",
    ),
    "all": tuple(CASES),
}  # fmt: skip
GRADIENTS = ("contrasts", "bias_gradients")
BUDGETS = (1.2, 2.5, math.inf)
RESAMPLES = 200


def subjects(options: Options) -> list[Photographs]:
    """As many draws as seeds were asked for, three at most."""
    numbers = range(min(options.seeds, len(DRAWS)))
    return [Photographs(Draw(options.data, options.cache, number)) for number in numbers]


def _named(budget: float) -> str:
    return f"fastgrad, budget {budget:g}" if math.isfinite(budget) else "fastgrad, unlimited"


def own(photographs: Photographs) -> dict[str, tuple[Report, UncertaintyDetector]]:
    """This package's detectors: three budgets, and the controls."""
    within = {_named(budget): photographs.candidates(budget) for budget in BUDGETS}
    whole = within[_named(math.inf)]
    least = within[_named(BUDGETS[0])]
    sets: dict[str, Candidates] = within | {
        "unlimited, no gradients (control)": _less(whole, GRADIENTS),
        "budget 1.2, no activations (control)": _less(least, ("activations",)),
        "budget 1.2, no image statistics (control)": _less(least, ("image",)),
        "logits and h alone (control)": _only(least, ("logits", "features")),
        "activations alone (control)": _only(least, ("activations",)),
        "image statistics alone (control)": _only(least, ("image",)),
    }
    X, kinds, held_out = photographs.samples
    found = {}
    for name, chosen in sets.items():
        base = UncertaintyDetector(log=False)
        own = {block.name: X[block.name] for block in chosen.blocks}
        report = chosen.choose(base, own, kinds, held_out, own=False)
        found[name] = report, report.fit(base, X, kinds, held_out)
    return found


def _less(chosen: Candidates, names: Sequence[str]) -> Candidates:
    blocks = [block for block in chosen.blocks if block.name not in names]
    entries = tuple(entry for entry in chosen.entries if entry.block not in names)
    return dataclasses.replace(chosen, blocks=blocks, entries=entries)


def _only(chosen: Candidates, names: Sequence[str]) -> Candidates:
    others = [block.name for block in chosen.blocks if block.name not in names]
    return dataclasses.replace(_less(chosen, others), fixed=True)


def evaluate(photographs: Photographs) -> dict[str, Any]:
    """Every method's scores of the clean and of every case's images, what budgets keep, what methods cost."""
    fitted = own(photographs)
    X, kinds, _ = photographs.samples
    clean = {name: X[name][np.flatnonzero(kinds == "")] for name in ("logits", "features")}
    layer = published.last_linear(photographs.draw.model)
    outputs = published.from_outputs(clean, layer.weight.detach(), layer.bias.detach())
    scores: dict[str, dict[str, Scores]] = {}
    for case in ("clean", *CASES):
        blocks = photographs.blocks(case)
        scores[case] = (
            {
                name: detector.decision_function({block: blocks[block] for block in detector.shapes_})
                for name, (_, detector) in fitted.items()
            }
            | {name: score(blocks) for name, score in outputs.items()}
            | photographs.published(case)
        )
    reports = {name: report for name, (report, _) in fitted.items()}
    return {
        "scores": scores,
        "reports": {name: report.to_json() for name, report in reports.items()},
        "prices": {name: report.price[1] for name, report in reports.items()}
        | dict.fromkeys(outputs, 1.0)
        | _prices(photographs),
    }


def _prices(photographs: Photographs) -> dict[str, float]:
    """Forward passes that the published detectors with gradients take, by processor time for 16 images."""
    from pytorch_ood.detector import ODIN

    model, known = photographs.draw.model, photographs.published("fit")
    x = photographs.draw.clean("test")[0][:16]
    movement = torch.from_numpy(known["movement"])

    def plain() -> None:
        with torch.no_grad():
            model(x)

    calls: dict[str, Callable[[], object]] = {
        "plain": plain,
        "ODIN": lambda: ODIN(model).predict(x),
        "AdaSCALE": lambda: published.adascale(model, x, movement),
    }
    taken = {name: [] for name in calls}  # type: dict[str, list[float]]
    for _ in range(4):
        for name, call in calls.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    least = {name: min(values) for name, values in taken.items()}
    return {name: least[name] / least["plain"] for name in calls if name != "plain"}


def resampled(scores: Mapping[str, Mapping[str, Scores]], method: str) -> dict[str, NDArray[np.float64]]:
    """AUROC of every case, as found and on resampled images ``(1 + R,)``; methods share the resamples."""
    found = {}
    for case in CASES:
        clean, other = scores["clean"][method], scores[case][method]
        rng = np.random.default_rng(len(clean) + len(other))
        above = (other[None] > clean[:, None]) + 0.5 * (other[None] == clean[:, None])
        # How often each image is drawn; once each to begin with.
        weights = [
            np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)]) / n
            for n in above.shape
        ]
        found[case] = ((weights[0] @ above) * weights[1]).sum(1)
    return found


def write(options: Options, subjects: Sequence[Photographs], found: Sequence[Mapping[str, Any]]) -> Page:
    """Methods by groups of cases, differences with intervals, cases of the budgets, and what the budgets keep."""
    methods = list(found[0]["scores"]["clean"])
    cells = {
        (subject.name, method): resampled(one["scores"], method)
        for subject, one in zip(subjects, found, strict=True)
        for method in methods
    }
    prices = {m: float(np.median([one["prices"][m] for one in found])) for m in methods}
    names = [subject.name for subject in subjects]

    def mean(draw: str, method: str, cases: Sequence[str]) -> NDArray[np.float64]:
        return np.mean([cells[draw, method][case] for case in cases], 0)  # type: ignore[no-any-return]

    def joined(method: str, cases: Sequence[str]) -> NDArray[np.float64]:
        return np.mean([mean(draw, method, cases) for draw in names], 0)  # type: ignore[no-any-return]

    rows: Rows = [
        {"network": "EfficientNet-Lite0", "draw": draw, "case": case, "method": method,
         "auroc": round(float(values[0]), 4), "interval": _interval(values)}
        for (draw, method), own in cells.items()
        for case, values in own.items()
    ]  # fmt: skip
    ordered = sorted(methods, key=lambda method: -joined(method, GROUPS["all"])[0])
    lines = []
    for method in ordered:
        line: dict[str, Any] = {"method": method, "passes": f"{prices[method]:.2f}"}
        for group, cases in GROUPS.items():
            each = [float(mean(draw, method, cases)[0]) for draw in names]
            row = {"case": f"mean of {group}", "method": method, "auroc": round(float(np.mean(each)), 4)}
            rows.append(row | {"spread": round(float(np.std(each, ddof=1)) if len(each) > 1 else 0.0, 4)})
            line[group] = f"{rows[-1]['auroc']:.3f} ± {rows[-1]['spread']:.3f}"
        lines.append(line)
    budgets = [_named(budget) for budget in BUDGETS]
    compared = []
    for method in ordered:
        if method == budgets[0]:
            continue
        line = {"budget 1.2 less": method}
        for group, cases in GROUPS.items():
            values = joined(budgets[0], cases) - joined(method, cases)
            low, high = _interval(values)
            line[group] = f"{values[0]:+.3f} [{low:+.3f}, {high:+.3f}]" + (
                "" if low > 0 or high < 0 else " none"
            )
        compared.append(line)
    by_case = [
        {"case": case} | {
            f"{method.removeprefix('fastgrad, ')}, {draw}": f"{cells[draw, method][case][0]:.3f}"
            for method in budgets for draw in names
        }
        for case in CASES
    ]  # fmt: skip
    aims = [
        {"draw": draw, "cases": group}
        | {
            method.removeprefix("fastgrad, "): f"{mean(draw, method, GROUPS[group])[0]:.3f}"
            for method in budgets
        }
        for draw, group in zip(names, ("first 15", "second 19", "all"), strict=False)
    ]
    kept = [
        {
            "budget": method.removeprefix("fastgrad, "),
            "draw": subject.name,
            "kept": ", ".join(report.kept),
            "H reads": ", ".join(report.seen or ()),
            "passes predicted, measured": f"{report.price[0]:.2f}, {report.price[1]:.2f}",
            "worth": "; ".join(
                f"{e.block} {e.worth:+.3f} ± {e.interval:.3f}" for e in report.entries if e.worth is not None
            ),
        }
        for method in budgets
        for subject, one in zip(subjects, found, strict=True)
        for report in [Report.from_json(one["reports"][method])]
    ]  # fmt: skip
    sections = [
        (
            "AUROC of clean test photographs against each case, means over the cases of a group and over draws, ± "
            "standard deviation between draws. *passes*: price in forward passes of the network, measured; that of "
            "this package's own rows is for 16 images. *first 15* and *second 19* are the groups that earlier figures "
            "for this network were given for. `normalization_norms`, `gradients` and `ranked` are not among the "
            "blocks of *unlimited*: they cost six forward passes and more.",
            results_file.table(lines),
        ),
        (
            f"What budget 1.2 is better by than each other method, with 95 % intervals from {RESAMPLES} resamples of "
            "the images; *none*: the interval holds zero.",
            results_file.table(compared),
        ),
        ("The groups of earlier figures, by draw.", results_file.table(aims)),
        ("What each budget keeps, and what each block was worth on generated challenges left out.",
         results_file.table(kept)),
        ("By case.", results_file.table(by_case)),
    ]  # fmt: skip
    groups = list(dict.fromkeys(CASES.values()))
    shown = [*budgets, *[m for m in ordered if m in ("softmax", "energy", "KNN", "ViM", "AdaSCALE")]]
    bars = {method: [float(joined(method, GROUPS[group])[0]) for group in groups] for method in shown}
    costs = [{"method": method, "forward_passes": round(prices[method], 2)} for method in methods]
    return Page([*rows, *costs], sections, grouped_bars(bars, groups))


def _interval(values: NDArray[np.float64]) -> list[float]:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return [round(float(low), 4), round(float(high), 4)]


TABLE = Table(
    "real",
    "Photographs, budgets and published detectors",
    ("photographs", *STRANGERS.values()),
    subjects,
    evaluate,
    write,
)
