"""Run a table: every method on every case of every network, with reasons for missing results and with intervals."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.detection import resampled
from bench.detection.experiment import CASES, Experiment, Fit, NotRun, Options
from bench.detection.registry import METHODS, NETWORKS, Method, Protocol
from bench.detection.tables import Table

Values = NDArray[np.float64]
Groups = dict[str, Values]
Row = dict[str, Any]
#: Errors for a missing package or file, or a property that a network lacks and a method needs.
ABSENT = (NotRun, ModuleNotFoundError, FileNotFoundError)
WORST = "worst of the attacks (MEAD)"
#: Slow networks with one draw: their intervals are over resampled images.
ONE_DRAW = ("lite1", "lite2", "densenet", "vit", "resnet56-training")


def measure(experiment: Experiment, method: Method, cases: Sequence[str]) -> tuple[dict[str, Values], dict[str, str]]:
    """Return a method's scores of the clean test images and of every case, and reasons for missing ones."""
    scores: dict[str, Values] = {}
    absent: dict[str, str] = {}
    fitted = cache(lambda of: method.fit(Fit(experiment, of)))

    def score(case: str, of: str) -> Values:
        def make() -> dict[str, Values]:
            return {"score": fitted(of)(experiment.seen(case)).detach().double().numpy()}

        return experiment.kept(f"scores/{method.name}/{of}/{case}", make)["score"]

    labelled = method.protocol is Protocol.LABELLED
    for case in cases if labelled else ("clean", *cases):
        # A detector that is trained on labels has one fit, and one set of clean scores, for each case.
        of = case if labelled else ""
        try:
            scores[case] = score(case, of)
            if of:
                scores[f"clean/{case}"] = score("clean", of)
        except ABSENT as why:
            absent[case] = str(why)
        except Exception as problem:  # a published detector may refuse a network in any way it likes
            if method.name.startswith("fastgrad"):
                raise
            absent[case] = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
    return scores, absent


def head_of(experiment: Experiment, method: Method) -> Row:
    return {
        "network": experiment.network,
        "draw": experiment.draw,
        "method": method.name,
        "protocol": method.protocol.value,
    }


def rows(table: Table, experiment: Experiment, method: Method, known: dict[str, Groups]) -> list[Row]:
    """Return a row for each case, and one for each group whose cases all have a number.

    ``known`` holds the groups of earlier methods; this method's are added. A method named ``A + B`` also has rows of
    the gain over A, from the same resampled images.
    """
    cases = [name for name, case in CASES.items() if case.group in table.groups and experiment.kind in case.kinds]
    slow = dict.fromkeys(("clean", *cases), "left out of quick mode: several passes an image")
    left_out = experiment.options.quick and method.slow and experiment.few
    scores, absent = ({}, slow) if left_out else measure(experiment, method, cases)
    head = head_of(experiment, method)
    made: list[Row] = []
    values: dict[str, Values] = {}
    for case in cases:
        if why := absent.get(case) or absent.get("clean"):
            made.append(head | {"case": case, "not run": why})
            continue
        values[case] = resampled.auroc(scores.get(f"clean/{case}", scores.get("clean")), scores[case])
        made.append(head | {"case": case, "inputs": len(scores[case])} | resampled.columns("auroc", values[case]))
    groups = known.setdefault(method.name, {})
    beside = known.get(method.name.split(" + ")[0], {}) if " + " in method.name else {}
    for group in dict.fromkeys(CASES[case].group for case in cases if CASES[case].group != "control"):
        names = [case for case in cases if CASES[case].group == group]
        present = [case for case in names if case in values]
        left = [row["not run"] for row in made[: len(cases)] if row["case"] in names and "not run" in row]
        # If no image of an attack misleads the network, that is a property of the case, not of a method.
        lacking = [why for why in left if "misleads" not in why]
        wholes = [head | {"case": f"mean of {group}", "group": group}]
        if "attacks" in group and method.protocol is not Protocol.LABELLED:
            wholes.append(head | {"case": f"{WORST}, {group}", "group": f"{WORST}, {group}"})
        if lacking or not present:
            made += [whole | {"not run": "; ".join(dict.fromkeys(left))} for whole in wholes]
            continue
        groups[group] = np.mean([values[case] for case in present], 0)
        made.append(wholes[0] | {"cases": len(present)} | resampled.columns("auroc", groups[group]))
        if group in beside:
            gain = resampled.columns("gain", groups[group] - beside[group])
            made.append(head | {"case": f"gain in {group}"} | gain)
        for whole in wholes[1:]:
            made.append(whole | resampled.columns("auroc", _worst(experiment, scores, present)))
    return made


def _worst(experiment: Experiment, scores: Mapping[str, Values], cases: Sequence[str]) -> Values:
    """Return the AUROC in which each image counts by its least unusual attack (Granese et al., MEAD, 2022)."""
    least: dict[int, float] = {}
    for case in cases:
        for source, score in zip(experiment.seen(case).shown.source.tolist(), scores[case].tolist(), strict=True):
            least[source] = min(score, least.get(source, np.inf))
    return resampled.auroc(scores["clean"], np.array(list(least.values())))


def over(networks: Sequence[str], options: Options, measured: Callable[[Experiment], list[Row]]) -> list[Row]:
    """Return the rows of each draw of each network; a network whose files are missing has one row that says so."""
    made: list[Row] = []
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in networks:
        for draw in range(1 if name in ONE_DRAW else options.draws):
            head = {"network": name, "draw": draw}
            try:
                experiment = NETWORKS[name].make(options, draw)
            except ABSENT as why:
                made.append(head | {"not run": str(why)})
                continue
            made += measured(experiment)
            fit, test = (len(experiment.parts[part][1]) for part in ("fit", "test"))
            right = len(experiment.right["test"]) / test
            made.append(head | {"accuracy": right, "fit": fit, "test": test, "count": experiment.count})
    return made


def facts(title: str, options: Options, methods: Mapping[str, Method]) -> dict[str, Any]:
    """Return the facts that a page gives about a table."""
    return {
        "title": title, "merit": "auroc", "quick": options.quick,
        "networks": {key: [one.title, one.tuned] for key, one in NETWORKS.items()},
        "methods": {key: [one.year, one.paper] for key, one in methods.items()},
    }  # fmt: skip


def run(table: Table, options: Options, networks: Sequence[str] = (), names: Sequence[str] = ()) -> list[Row]:
    methods = [METHODS[name] for name in names or METHODS if METHODS[name].protocol in table.protocols]
    # Methods of one pass first, and ours last.
    methods.sort(key=lambda method: (method.slow, method.name.startswith("fastgrad")))

    def measured(experiment: Experiment) -> list[Row]:
        made: list[Row] = []
        known: dict[str, Groups] = {}
        for method in methods:
            begun = time.perf_counter()
            made += rows(table, experiment, method, known)
            words = f"{experiment.network}, draw {experiment.draw}, {method.name}: {time.perf_counter() - begun:.1f} s"
            print(words, file=sys.stderr, flush=True)
        return made

    return over(networks or table.networks, options, measured)
