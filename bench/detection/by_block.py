"""What each block of the default detector finds: AUROC of attacks, with one block alone and with all but one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.detection import resampled, runner
from bench.detection.experiment import CASES, Experiment, Fit, Options
from bench.detection.methods_ours import answer, fitted
from bench.detection.registry import NETWORKS
from fastgrad.blocks import DEFAULT_BLOCKS

DEFAULT_NETWORKS = ("resnet56", "lite0")


def forms() -> dict[str, tuple[str, ...]]:
    """Return the blocks that are read, by the name in the table."""
    alone = {f"{name} alone": (name,) for name in DEFAULT_BLOCKS}
    without = {f"without {name}": tuple(other for other in DEFAULT_BLOCKS if other != name) for name in DEFAULT_BLOCKS}
    return {"all": tuple(DEFAULT_BLOCKS), **alone, **without}


def measure(experiment: Experiment) -> list[dict[str, Any]]:
    found = []
    cases = [name for name, case in CASES.items() if case.group == "attacks" and experiment.kind in case.kinds]
    for form, blocks in forms().items():
        two_stage = fitted(Fit(experiment), blocks)
        clean = answer(two_stage, experiment.seen("clean")).uncertainty.numpy()
        for case in cases:
            head = {"network": experiment.network, "draw": experiment.draw, "method": form, "case": case}
            try:
                other = answer(two_stage, experiment.seen(case)).uncertainty.numpy()
            except runner.ABSENT as why:
                found.append(head | {"not run": str(why)})
                continue
            found.append(head | {"inputs": len(other), **resampled.columns("auroc", resampled.auroc(clean, other))})
    return found


def run(options: Options, networks: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    about = {name: [NETWORKS[name].title, NETWORKS[name].tuned] for name in DEFAULT_NETWORKS}
    return runner.over(networks, options, measure), {"quick": options.quick, "networks": about}
