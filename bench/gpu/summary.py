"""``summary.md`` of a GPU run: every step's outcome, the floors, each kernel's share of them, targets met or not.

python -m bench.gpu.summary --out DIR --step NAME=STATUS ...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report.document import Row
from bench.report.speed import tables
from bench.report.text import table

Target = tuple[str, str, str, str, float]
#: Name, case, implementation, yardstick ("" for the case's own), largest ratio of medians.
TARGETS: tuple[Target, ...] = (
    ("fused head at most 1.10 of the product", "head B=1024 N=32000 D=4096 bfloat16", "fastgrad Triton", "", 1.10),
    ("fused head faster than product, softmax, closed form", "head B=1024 N=32000 D=4096 bfloat16", "fastgrad Triton",
     "linear, softmax, closed form", 1.0),
    *(
        (f"batch {B}, N = 1000 at most 1.5 of the product alone", f"head B={B} N=1000 D=2048 bfloat16",
         "fastgrad Triton", "", 1.5)
        for B in (1, 8, 32)
    ),
    ("ResNet-18 (B = 512) at most one training step", "ResNet-18 32x32 B=512 bce ones", "fastgrad", "", 1.0),
    ("ViT-B/16 (B = 128) at most one training step", "ViT-B/16 224x224 B=128 bce ones", "fastgrad", "", 1.0),
    ("ResNet-18 at least 50 times the loop", "ResNet-18 32x32 B=64 bce ones", "fastgrad", "per-sample loop", 1 / 50),
)  # fmt: skip
COPY_TARGET = ("contrast_sqnorm B=4096 N=32000 D=4096 bf16 cross_entropy", 0.85)


def load(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing where the step that writes it failed."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def targets(cases: Sequence[Row], kernels: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target beside what was measured."""
    medians = {(r["case"], r["implementation"]): r["median_s"] for r in cases}
    bases = {r["case"]: r["relative_to"] for r in cases}
    rows = []
    for name, case, implementation, yardstick, limit in TARGETS:
        mine = medians.get((case, implementation))
        base = medians.get((case, yardstick or bases.get(case, "")))
        ratio = mine / base if mine and base else None
        rows.append(
            {"target": name, "measured": ratio, "limit": limit, "met": _met(ratio, limit, above=False)}
        )
    case, least = COPY_TARGET
    share = next((r["of_copy_rate"] for r in kernels.get("rows", []) if r["case"] == case), None)
    rows.append(
        {"target": "contrast kernel at 85 % of the copy rate", "measured": share, "limit": least,
         "met": _met(share, least, above=True)}
    )  # fmt: skip
    return rows


def _met(value: float | None, limit: float, above: bool) -> str:
    if value is None:
        return "not measured"
    return "yes" if (value >= limit if above else value <= limit) else "no"


def summary(folder: Path, steps: Sequence[str], dry: bool) -> str:
    """The page."""
    found = [
        load(folder / f"{name}.json").get("cases", [])
        for name in ("last-layer", "rows", "network", "end-to-end")
    ]
    cases: list[Row] = [row for rows in found for row in rows]
    kernels = load(folder / "kernels.json")
    lines = ["# GPU run" + (": dry run, in the interpreter at tiny sizes" if dry else "")]
    if kernels:
        versions = ", ".join(f"{k} {v}" for k, v in kernels["versions"].items())
        rates = ", ".join(f"{k} {v / 1e12:.4g} TFLOP/s" for k, v in kernels["matrix_per_s"].items())
        lines.append(
            f"{kernels['device']}; {versions}; revision {kernels['revision']}. Measured: copy "
            f"{kernels['copy_bytes_per_s'] / 1e9:.4g} GB/s, matrix product {rates}."
        )
    status = [dict(zip(("step", "status"), step.split("=", 1), strict=True)) for step in steps]
    lines += ["## Steps", table(status, {"step": "step", "status": "status"})]
    if not dry:
        heads = {"target": "target", "measured": "measured", "limit": "limit", "met": "met"}
        lines += ["## Targets", table(targets(cases, kernels), heads)]
    if kernels:
        heads = {
            "case": "kernel", "median_s": "seconds", "of_copy_rate": "of measured copy rate",
            "of_matrix_rate": "of measured matrix rate",
        }  # fmt: skip
        lines += ["## Kernels", table(kernels["rows"], heads)]
    if cases:
        lines += ["## Cases", tables(cases)]
    for name in ("tests.txt", "sanitizer.txt"):
        if (folder / name).exists():
            tail = (folder / name).read_text().splitlines()[-12:]
            lines.append(f"## End of {name}\n\n```\n" + "\n".join(tail) + "\n```")
    return "\n\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.gpu.summary", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", action="append", default=[], metavar="NAME=STATUS")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    (options.out / "summary.md").write_text(summary(options.out, options.step, options.dry_run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
