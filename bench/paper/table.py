"""What a table is: its name, what it is measured on, what is measured there, and how it is written.

A table is a file in ``bench/paper/tables`` with a `Table` called ``TABLE``; ``python -m bench.paper NAME`` runs it.
README.md beside this file has the recipe.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import results_file
from bench.paper.data import sets
from bench.paper.rows import Rows
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
        network: of `bench.paper.train.NETWORKS`; None for the small ones of the table.
        seeds: networks of each kind.
        workers: processes at a time, one thread each.
        fit: held-out training images that detectors are fitted on.
        test: clean test images.
        case: images of every attack.
        strangers: images of every other data set, and as many others where a detector trains on them.
        learn: images of an attack where a detector trains on it, as the published ones do.
        cell: images of every corruption at every severity.
        epochs: passes over the data in training.
    """

    data: Path
    out: Path
    cache: Path
    mode: str = "quick"
    network: str | None = None
    seeds: int = 3
    workers: int = 2
    fit: int = 1600
    test: int = 400
    case: int = 150
    strangers: int = 150
    learn: int = 400
    cell: int = 100
    epochs: int = 8

    @property
    def quick(self) -> bool:
        """Whether the small sizes were asked for."""
        return self.mode == "quick"


@dataclass(frozen=True)
class Page:
    """A table as it is written.

    Attributes:
        rows: what the JSON file keeps.
        sections: pairs of text and Markdown table.
        axes: of the figure.
    """

    rows: Rows
    sections: Sequence[tuple[str, str]]
    axes: Any


@dataclass(frozen=True)
class Table:
    """One evaluation table.

    Attributes:
        name: of the files it writes.
        title: its heading.
        sets: names of the data sets it reads, checked before any work starts.
        subjects: what it is measured on, networks or draws of photographs: anything with a ``name`` for the progress
            and ``prepare()``, which makes what the cache lacks. Each is evaluated in a process of its own.
        evaluate: what is measured on one subject.
        write: from the subjects and what was measured on each, the page; None where there is none.
        needed: further subjects that ``evaluate`` reads, prepared but not measured.
        networks: whether it can be measured on another network than the small ones, in files of another name.
    """

    name: str
    title: str
    sets: Sequence[str]
    subjects: Callable[[Options], Sequence[Any]]
    evaluate: Callable[[Any], Any] | None
    write: Callable[[Options, Sequence[Any], Sequence[Any]], Page] | None
    needed: Callable[[Options], Sequence[Any]] = lambda options: ()
    networks: bool = False

    def run(self, options: Options) -> None:
        """Make the table.

        Raises:
            FileNotFoundError: A set is missing; the message names the folder and the file.
            ValueError: A file of the folder or of the cache is damaged or of another network; the message names it.
        """
        if options.network and not self.networks:
            raise ValueError(
                f"network must be left out for the table {self.name}; it was {options.network!r}"
            )
        sets.check(options.data, self.sets)
        every = {subject.name: subject for subject in [*self.subjects(options), *self.needed(options)]}
        parallel(_prepare, every.values(), options.workers)
        if self.evaluate is None:
            return
        options.out.mkdir(parents=True, exist_ok=True)
        # Fresh ones: what was prepared is on the disk, and need not stay in memory.
        subjects = self.subjects(options)
        found = parallel(partial(_evaluate, self.name, self.evaluate), subjects, options.workers)
        if self.write is None:
            return
        page = self.write(options, subjects, found)
        name = f"{self.name}-{options.network}" if options.network else self.name
        title = f"{self.title}, {options.network}" if options.network else self.title
        save(page.axes, options.out / f"{name}.png", dpi=90)
        sections = [*page.sections, (f"![{title}]({name}.png)", "")]
        results_file.write(
            name,
            title,
            page.rows,
            sections,
            mode=options.mode,
            packages=PACKAGES,
            folder=options.out,
        )


def _prepare(subject: Any) -> None:
    subject.prepare()


def _evaluate(table: str, evaluate: Callable[[Any], Any], subject: Any) -> Any:
    start = time.perf_counter()
    found = evaluate(subject)
    print(f"{table} {subject.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the .npz files or torchvision's"
    )
    parser.add_argument("--out", type=Path, default=results_file.RESULTS, help="folder for the results")
    parser.add_argument("--cache", type=Path, default=Path("paper-cache"), help="networks and features")
    parser.add_argument("--quick", action="store_true", help="small sets, under ten minutes on two cores")
    parser.add_argument(
        "--network",
        help="resnet18 or densenet-bc; of real, efficientnet-lite1 or -lite2; by default that of the table",
    )
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument(
        "--workers", type=int, help="processes, one thread each; default one per core, one on a GPU"
    )


def options_of(given: argparse.Namespace) -> Options:
    """The options from the command line."""
    sizes = {
        "fit": 5000,
        "test": 5000,
        "case": 1000,
        "strangers": 1000,
        "learn": 3000,
        "cell": 500,
        "epochs": 60,
    }
    if given.quick:
        # A larger network makes fewer attacks and corruptions in the time.
        few = {"fit": 1000, "test": 500, "case": 100, "strangers": 200, "learn": 100, "cell": 20}
        sizes = few if given.network else {}
    return Options(
        data=given.data,
        out=given.out,
        cache=given.cache,
        mode="quick" if given.quick else "full",
        network=given.network,
        seeds=given.seeds,
        workers=given.workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1),
        **sizes,
    )


def parallel(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> list[Result]:
    """``function`` of every task, in order, in processes of one thread each: the networks are small."""
    tasks = list(tasks)
    if workers < 2 or len(tasks) < 2:
        return [function(task) for task in tasks]
    # The children read these when they import their numerical libraries, which would each take every core.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(tasks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, tasks, chunksize=1))
