"""The report of a benchmark as it is stored: one JSON file.

    {"machine", "versions", "revision", "seed", "cases": [{"case", "implementation", "median_s", "p10_s", "p90_s",
     "peak_bytes", "relative_to", "ratio", "correct"}]}

``ratio`` is the median over that of ``relative_to`` in the same case; times are null where an implementation was not
correct or did not accept the task. The floors are cases too (``floor: ...``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from bench.harness import results_file
from bench.harness.case import Result

PACKAGES = (
    "torch", "triton", "numpy", "torchvision", "backpack-for-pytorch", "opacus", "pytorch-ood", "liger-kernel",
    "cut-cross-entropy",
)  # fmt: skip
Row = dict[str, Any]


def rows(results: Iterable[Result]) -> list[Row]:
    """Results as the JSON's cases."""
    results = list(results)
    medians = {(r.case, r.implementation): r.quantile(0.5) for r in results}
    found = []
    for r in results:
        median, base = medians[r.case, r.implementation], medians.get((r.case, r.relative_to))
        found.append(
            {
                "case": r.case,
                "implementation": r.implementation,
                "median_s": median,
                "p10_s": r.quantile(0.1),
                "p90_s": r.quantile(0.9),
                "peak_bytes": r.peak_bytes,
                "relative_to": r.relative_to,
                "ratio": median / base if median and base else None,
                "correct": r.correct,
            }
        )
    return found


def document(results: Iterable[Result], seed: int, device: str) -> dict[str, Any]:
    """The whole report."""
    machine = results_file.machine()
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    else:
        machine = f"{machine}, {torch.get_num_threads()} threads"
    return {
        "machine": machine,
        "versions": results_file.versions(*PACKAGES),
        "revision": results_file.revision(),
        "seed": seed,
        "cases": rows(results),
    }


def merge(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A report with the new one's cases in place of those of the same name; the environment must be the same."""
    for key in ("machine", "versions", "seed"):
        if old[key] != new[key]:
            raise ValueError(f"{key} of the report to be extended must be {new[key]!r}; it was {old[key]!r}")
    renewed = {row["case"] for row in new["cases"]}
    kept = [row for row in old["cases"] if row["case"] not in renewed]
    return {**new, "cases": kept + new["cases"]}
