"""Run a detection table.

    python -m bench.detection photographs --quick --data DIR --cache CACHE
    python -m bench.detection attacks --networks resnet18 --data DIR --cache CACHE --out bench/results

Scores, images and features are kept in the cache: delete it after changing how they are computed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.detection import cases, methods_images, methods_ours, methods_outputs, networks, runner  # noqa: F401
from bench.detection.registry import METHODS, NETWORKS, Options
from bench.detection.tables import TABLES
from bench.report import pages

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scikit-learn",
    "foolbox",
    "imagecorruptions-imaug",
    "pytorch-ood",
)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.detection", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the .npz files or torchvision's"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("detection-cache"), help="networks, images, features, scores"
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default: bench/results)")
    parser.add_argument("--quick", action="store_true", help="small sets; the files carry the word")
    parser.add_argument(
        "--draws", type=int, default=1, help="samples of the data, or networks of other seeds"
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=[], help="default: those of the table"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=[], metavar="NAME", help="default: all"
    )
    parser.add_argument(
        "--training", action="store_true", help="fit on images that the network was trained on"
    )
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    table = TABLES[given.table]
    options = Options(given.data, given.cache, given.quick, given.draws, given.training)
    rows = runner.run(table, options, given.networks, given.methods)
    name = f"{given.table}-quick" if given.quick else given.table
    facts = {
        "table": given.table, "title": table.title, "text": table.text, "merit": table.merit,
        "groups": list(table.groups), "quick": given.quick, "seconds": round(time.perf_counter() - start),
        "networks": {key: [one.title, one.tuned] for key, one in NETWORKS.items()},
        "methods": {key: [one.year, one.paper] for key, one in METHODS.items()},
    }  # fmt: skip
    pages.save(name, rows, packages=PACKAGES, folder=given.out, facts=facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
