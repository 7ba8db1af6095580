"""``summary.md`` of a GPU run: every step's outcome, the floors, each kernel's share of them, targets met or not.

python -m bench.gpu.summary --out DIR --step NAME=STATUS ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report.speed import tables
from bench.report.text import table

HEAD, UNFUSED = "head B=1024 N=32000 D=4096 bfloat16", "linear, softmax, closed form"
RESNET = "ResNet-18 32x32 B={} bce ones"
#: Target, case, implementation, yardstick, largest ratio of medians.
TARGETS = (
    ("fused head at most 1.10 of the product", HEAD, "fastgrad Triton", "linear alone", 1.10),
    ("fused head faster than product, softmax, closed form", HEAD, "fastgrad Triton", UNFUSED, 1),
    *(
        (f"batch {B}, N = 1000 at most 1.5 of the product alone", f"head B={B} N=1000 D=2048 bfloat16",
         "fastgrad Triton", "linear alone", 1.5)
        for B in (1, 8, 32)
    ),
    ("ResNet-18 (B = 512) at most one training step", RESNET.format(512), "fastgrad", "training step", 1),
    ("ViT-B/16 (B = 128) at most one training step", "ViT-B/16 224x224 B=128 bce ones", "fastgrad", "training step", 1),
    ("ResNet-18 at least 50 times the loop", RESNET.format(64), "fastgrad", "per-sample loop", 1 / 50),
)  # fmt: skip
#: The kernel that must reach a share of the copy rate.
COPYING, COPY_SHARE = "contrast_sqnorm B=4096 N=32000 D=4096 bfloat16", 0.85


def targets(cases: Sequence[dict[str, Any]], kernels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each target beside what was measured."""
    medians = {(r["case"], r["implementation"]): r["median_s"] for r in cases}
    rows = []
    for name, case, implementation, yardstick, limit in TARGETS:
        mine, base = medians.get((case, implementation)), medians.get((case, yardstick))
        ratio = mine / base if mine and base else None
        met = "not measured" if ratio is None else "yes" if ratio <= limit else "no"
        rows.append({"target": name, "measured": ratio, "limit": float(limit), "met": met})
    share = next((r["of_copy_rate"] for r in kernels if r["case"] == COPYING), None)
    met = "not measured" if share is None else "yes" if share >= COPY_SHARE else "no"
    name = f"contrast kernel at {COPY_SHARE:.0%} of the copy rate"
    return [*rows, {"target": name, "measured": share, "limit": COPY_SHARE, "met": met}]


def summary(folder: Path, steps: Sequence[str], dry: bool) -> str:
    """Return the page; a step that failed has left no file."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    kernels = found.pop("kernels", {"rows": []})
    cases = [row for document in found.values() for row in document.get("cases", [])]
    lines = ["# GPU run" + (": dry run, in the interpreter at tiny sizes" if dry else "")]
    if kernels["rows"]:
        versions = ", ".join(f"{k} {v}" for k, v in kernels["versions"].items())
        rates = ", ".join(f"{k} {v / 1e12:.4g} TFLOP/s" for k, v in kernels["matrix_per_s"].items())
        lines.append(
            f"{kernels['device']}; {versions}; revision {kernels['revision']}. Measured: copy "
            f"{kernels['copy_bytes_per_s'] / 1e9:.4g} GB/s, matrix product {rates}."
        )
    lines += [
        "## Steps",
        table(dict(zip(("step", "status"), step.split("=", 1), strict=True)) for step in steps),
    ]
    if not dry:
        lines += ["## Targets", table(targets(cases, kernels["rows"]))]
    if kernels["rows"]:
        heads = {
            "case": "kernel", "median_s": "seconds", "of_copy_rate": "of measured copy rate",
            "of_matrix_rate": "of measured matrix rate",
        }  # fmt: skip
        lines += ["## Kernels", table(kernels["rows"], heads)]
    if cases:
        lines += ["## Cases", tables(cases)]
    for path in (folder / "tests.txt", folder / "sanitizer.txt"):
        if path.exists():
            tail = "\n".join(path.read_text().splitlines()[-12:])
            lines.append(f"## End of {path.name}\n\n```\n{tail}\n```")
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", action="append", default=[], metavar="NAME=STATUS")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    (options.out / "summary.md").write_text(summary(options.out, options.step, options.dry_run))


if __name__ == "__main__":
    main()
