"""Photographs and a network of published size: budgets, controls and published detectors on cases nobody trained on.

EfficientNet-Lite0, three draws of the photographs on which this package's choices were compared; with ``--network`` a
larger one, on a draw of its own that had no say. Detectors see clean photographs and, those of this package,
challenges generated from them; the cases are for the test alone. Which blocks a budget keeps is chosen on generated
challenges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import results_file
from bench.paper import own, published
from bench.paper.draws import AFTER, CASES, COMPARED, CONTROL, FOREIGN, STRANGERS, Draw
from bench.paper.figures import grouped_bars
from bench.paper.own import BUDGETS, named
from bench.paper.photograph_features import Photographs
from bench.paper.price import prices
from bench.paper.resampled import RESAMPLES, Scores, auroc, difference, interval
from bench.paper.rows import Rows
from bench.paper.table import Options, Page, Table
from fastgrad.detector.budget import Report

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
    "all": tuple(name for name in CASES if name != CONTROL),
}  # fmt: skip


def subjects(options: Options) -> list[Photographs]:
    """As many draws as seeds were asked for, three at most; the one that is left for a network that was asked for."""
    if options.network:
        other = Draw(options.data, options.cache, COMPARED, network=options.network)
        return [Photographs(other)]
    return [Photographs(Draw(options.data, options.cache, n)) for n in range(min(options.seeds, COMPARED))]


def evaluate(photographs: Photographs) -> dict[str, Any]:
    """Every method's scores of the clean and of every case's images, what budgets keep, what methods cost."""
    reading, model = photographs.reading, photographs.draw.model
    fitted = own.own(reading, photographs.samples)
    layer = published.last_linear(model)
    outputs = published.from_outputs(photographs.samples.clean.blocks, layer)
    scores: dict[str, dict[str, Scores]] = {}
    for case in ("clean", *(name for name in CASES if name not in photographs.empty)):
        blocks = photographs.blocks(case)
        scores[case] = (
            {name: own.scores(detector, blocks) for name, (_, detector) in fitted.items()}
            | {name: score(blocks) for name, score in outputs.items()}
            | photographs.published(case)
        )
    calls = {name: reading.live(report, detector) for name, (report, detector) in fitted.items()}
    calls |= {name: partial(score, reading.x) for name, score in photographs.from_images.items()}
    return {
        "scores": scores,
        "reports": {name: report.to_json() for name, (report, _) in fitted.items()},
        "prices": prices(model, reading.x, calls) | dict.fromkeys(outputs, 1.0),
    }


def write(options: Options, subjects: Sequence[Photographs], found: Sequence[Mapping[str, Any]]) -> Page:
    """Methods by groups of cases, differences with intervals, cases of the budgets, and what the budgets keep."""
    methods = list(found[0]["scores"]["clean"])
    measured = [case for case in CASES if all(case in one["scores"] for one in found)]
    groups = {group: [case for case in cases if case in measured] for group, cases in GROUPS.items()}
    cells = {
        (subject.name, method): {
            case: auroc(one["scores"]["clean"][method], one["scores"][case][method]) for case in measured
        }
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
        {"network": subjects[0].draw.network, "draw": draw, "case": case, "method": method,
         "auroc": round(float(values[0]), 4), "interval": interval(values)}
        for (draw, method), cases in cells.items()
        for case, values in cases.items()
    ]  # fmt: skip
    ordered = sorted(methods, key=lambda method: -joined(method, groups["all"])[0])
    lines = []
    for method in ordered:
        line: dict[str, Any] = {"method": method, "passes": f"{prices[method]:.2f}"}
        for group, cases in groups.items():
            each = [float(mean(draw, method, cases)[0]) for draw in names]
            row = {"case": f"mean of {group}", "method": method, "auroc": round(float(np.mean(each)), 4)}
            if len(each) > 1:
                row["spread"] = round(float(np.std(each, ddof=1)), 4)
                around = f"± {row['spread']:.3f}"
            else:
                row["interval"] = interval(joined(method, cases))
                around = "[{:.3f}, {:.3f}]".format(*row["interval"])
            rows.append(row)
            line[group] = f"{row['auroc']:.3f} {around}"
        lines.append(line)
    budgets = [named(budget) for budget in BUDGETS]
    compared = []
    for method in ordered:
        if method == budgets[0]:
            continue
        line = {"budget 1.2 less": method}
        for group, cases in groups.items():
            line[group] = difference(joined(budgets[0], cases) - joined(method, cases), 3)
        compared.append(line)
    by_case = [
        {"case": case} | {
            f"{method.removeprefix('fastgrad, ')}, {draw}": f"{cells[draw, method][case][0]:.3f}"
            for method in budgets for draw in names
        }
        for case in measured
    ]  # fmt: skip
    aims = [
        {"draw": draw, "cases": group}
        | {
            method.removeprefix("fastgrad, "): f"{mean(draw, method, groups[group])[0]:.3f}"
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
            "worth": own.worths(report),
        }
        for method in budgets
        for subject, one in zip(subjects, found, strict=True)
        for report in [Report.from_json(one["reports"][method])]
    ]  # fmt: skip
    sections = [
        (
            f"{about(subjects, measured)} AUROC of clean test photographs against each case, means over the cases of a "
            "group and over draws, ± standard deviation between draws; of one draw 95 % intervals over its images. "
            "*passes*: price in forward passes of the network, by processor time for 16 images. *first 15* and "
            "*second 19* are the groups that earlier figures for this data were given for. *all* leaves out the "
            "control: photographs that were compressed like the attacked ones and not attacked. `gradients` and "
            "`ranked` are not among the blocks of *unlimited*: they cost six forward passes and more.",
            results_file.table(lines),
        ),
        (
            f"What budget 1.2 is better by than each other method, with 95 % intervals from {RESAMPLES} resamples of "
            "the images; *none*: the interval holds zero.",
            results_file.table(compared),
        ),
        *([] if options.network else [("The groups of earlier figures, by draw.", results_file.table(aims))]),
        ("What each budget keeps, and what each block was worth on generated challenges left out.",
         results_file.table(kept)),
        ("By case.", results_file.table(by_case)),
    ]  # fmt: skip
    kinds = list(dict.fromkeys(CASES.values()))
    shown = [*budgets, *[m for m in ordered if m in ("softmax", "energy", "KNN", "ViM", "AdaSCALE")]]
    bars = {method: [float(joined(method, groups[kind])[0]) for kind in kinds] for method in shown}
    costs = [{"method": method, "forward_passes": round(prices[method], 2)} for method in methods]
    return Page([*rows, *costs], sections, grouped_bars(bars, kinds))


def about(subjects: Sequence[Photographs], measured: Sequence[str]) -> str:
    """The network, the photographs, who had a say, and the cases that are not among the measured ones."""
    draws = [subject.draw for subject in subjects]
    sizes = draws[-1].sizes
    say = (
        "This package's choices were compared on these draws"
        if draws[0].number < COMPARED
        else "Neither this network nor this draw had a say in this package's choices"
    )
    right = np.mean(np.concatenate([draw.right for draw in draws]))
    empty = [case for case in CASES if case not in measured]
    left_out = f" No image of {', '.join(empty)} misleads it: left out of every mean." if empty else ""
    return (
        f"{draws[0].network}, right on {right:.1%} of the test photographs. {draws[-1].name.capitalize()} has "
        f"{sizes.fit + sizes.calibration} photographs to fit on, {sizes.test} to test on and {sizes.case} images of "
        f"each case, at most.{left_out} {say}."
    )


TABLE = Table(
    "real",
    "Photographs, budgets and published detectors",
    ("photographs", *STRANGERS.values()),
    subjects,
    evaluate,
    write,
    networks=True,
)
