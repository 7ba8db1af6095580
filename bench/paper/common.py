"""What the tables share: options, sizes, processes, and rows with their spread over seeds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from bench import results_file
from fastgrad.plots import save

Task = TypeVar("Task")
Result = TypeVar("Result")

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scikit-learn",
    "foolbox",
    "imagecorruptions-imaug",
    "pytorch-ood",
)


@dataclass(frozen=True)
class Options:
    """What a command was asked for.

    Attributes:
        data: folder with the data sets.
        out: folder for JSON, Markdown and figures.
        cache: folder for trained networks and extracted features; safe to delete.
        mode: ``"quick"`` or ``"full"``.
        seeds: networks of each kind.
        workers: processes at a time, one thread each.
        fit: held-out training images that detectors are fitted on.
        test: clean test images.
        case: images of every attack or other data set, and as many others where a detector trains on them.
        learn: images of an attack where a detector trains on it, as the published ones do.
        cell: images of every corruption at every severity.
        epochs: passes over the data in training.
    """

    data: Path
    out: Path
    cache: Path
    mode: str = "quick"
    seeds: int = 3
    workers: int = 2
    fit: int = 1600
    test: int = 400
    case: int = 150
    learn: int = 400
    cell: int = 100
    epochs: int = 8

    @property
    def quick(self) -> bool:
        """Whether the small sizes were asked for."""
        return self.mode == "quick"


def parse(description: str, arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the .npz files or torchvision's"
    )
    parser.add_argument("--out", type=Path, default=results_file.RESULTS, help="folder for the results")
    parser.add_argument("--cache", type=Path, default=Path("paper-cache"), help="networks and features")
    parser.add_argument("--quick", action="store_true", help="small sets, under ten minutes on two cores")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=1 if torch.cuda.is_available() else os.cpu_count() or 1
    )
    given = parser.parse_args(arguments)
    sizes = (
        {}
        if given.quick
        else {"fit": 5000, "test": 5000, "case": 1000, "learn": 3000, "cell": 500, "epochs": 60}
    )
    return Options(
        data=given.data,
        out=given.out,
        cache=given.cache,
        mode="quick" if given.quick else "full",
        seeds=given.seeds,
        workers=given.workers,
        **sizes,
    )


def parallel(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> list[Result]:
    """``function`` of every task, in order, in processes of one thread each: the networks are small."""
    if workers < 2 or len(tasks) < 2:
        return [function(task) for task in tasks]
    # The children read these when they import their numerical libraries, which would each take every core.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(tasks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, tasks, chunksize=1))


def detection_rows(found: Sequence[Mapping[tuple[str, str, str], float]]) -> list[dict[str, Any]]:
    """Rows of a detection table from one mapping (network, case, method) -> AUROC per seed.

    ``auroc`` is the mean over seeds, ``spread`` the standard deviation between them.
    """
    rows = []
    keys = dict.fromkeys(key for mapping in found for key in mapping)
    for network, case, method in keys:
        values = [m[network, case, method] for m in found if (network, case, method) in m]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        rows.append(
            {
                "network": network,
                "case": case,
                "method": method,
                "auroc": round(float(np.mean(values)), 4),
                "spread": round(spread, 4),
                "seeds": len(values),
            }
        )
    return rows


def pivot(rows: Sequence[Mapping[str, Any]], cases: Sequence[str], methods: Sequence[str]) -> str:
    """A Markdown table with one line per method and one column per case, in hundredths, and their mean."""
    table = []
    for method in methods:
        values = {row["case"]: row for row in rows if row["method"] == method and row["case"] in cases}
        if not values:
            continue
        line: dict[str, Any] = {"method": method}
        for case in cases:
            if case in values:
                line[case] = f"{100 * values[case]['auroc']:.1f} ± {100 * values[case]['spread']:.1f}"
        numbers = [row["auroc"] for row in values.values()]
        line["mean"] = f"**{100 * np.mean(numbers):.1f}**"
        line["worst"] = f"{100 * np.min(numbers):.1f}"
        table.append(line)
    return results_file.table(table, {key: key for key in ("method", *cases, "mean", "worst")})


def finish(
    options: Options,
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    sections: Sequence[tuple[str, str]],
    axes: Any,
) -> None:
    """Write the table's JSON, Markdown and figure."""
    options.out.mkdir(parents=True, exist_ok=True)
    save(axes, options.out / f"{name}.png", dpi=90)
    closing = [*sections, (f"![{title}]({name}.png)", "")]
    results_file.write(name, title, rows, closing, mode=options.mode, packages=PACKAGES, folder=options.out)
