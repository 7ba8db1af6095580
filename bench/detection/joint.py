"""One score or two an input: which answers to accept where some are wrong and some inputs are of no class (DS-F1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.detection import runner
from bench.detection.double import ds_aurc, ds_f1
from bench.detection.experiment import CASES, Experiment, Options
from bench.detection.failure import OWN, judged
from bench.detection.registry import METHODS, NETWORKS

DEFAULT_NETWORKS = ("resnet56", "densenet", "resnet")
#: The score of errors and the score of foreign inputs, by the name in the table.
PAIRS: Mapping[str, tuple[str, str]] = {
    **{name: (name, name) for name in ("softmax", "energy", "SIRC", "fastgrad, risk")},
    **{f"softmax, {name}": ("softmax", name) for name in ("energy", "KNN", "ViM", "GROOD")},
    "fastgrad, risk and uncertainty": ("fastgrad, risk", "fastgrad, default"),
}
GROUPS = ("near sets", "far sets")


def measure(experiment: Experiment) -> list[dict[str, Any]]:
    known = {**METHODS, **{one.name: one for one in OWN}}
    cases = [name for name, case in CASES.items() if case.group in GROUPS and experiment.kind in case.kinds]
    scores = {name: runner.measure(experiment, known[name], cases)[0] for name in {*sum(PAIRS.values(), ())}}
    right = judged(experiment, "clean").wrong == 0
    found = []
    for group in GROUPS:
        parts = ["clean", *(case for case in cases if CASES[case].group == group)]
        of_clean = np.concatenate([np.full(len(scores["softmax"][case]), case == "clean") for case in parts])
        success = np.concatenate([right, np.zeros(len(of_clean) - len(right), bool)])
        for pair, names in PAIRS.items():
            error, foreign = (np.concatenate([scores[name][case] for case in parts]) for name in names)
            given = error, foreign, success, of_clean
            figures = {"ds_f1": round(ds_f1(*given), 4), "ds_aurc": round(ds_aurc(*given), 4)}
            head = {"network": experiment.network, "draw": experiment.draw, "method": pair, "case": group}
            found.append(head | {"inputs": len(error)} | figures)
    return found


def run(options: Options, networks: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    about = {name: [NETWORKS[name].title, NETWORKS[name].tuned] for name in DEFAULT_NETWORKS}
    return runner.over(networks, options, measure), {"quick": options.quick, "networks": about}
