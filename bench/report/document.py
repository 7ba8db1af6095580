"""The results of a speed table as they are stored: one JSON file.

    {"machine", "versions", "revision", "seed", "floor", "cases": [{"case", "implementation", "median_s", "p10_s",
     "p90_s", "peak_bytes", "relative_to", "ratio", "correct", "error", "note"}]}

``ratio`` is the median over that of ``relative_to`` in the same case; times are null where an implementation was not
correct or did not accept the task.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results_file
from bench.clock import Floor
from bench.registry import Case, Place

PACKAGES = (
    "torch", "triton", "numpy", "torchvision", "backpack-for-pytorch", "opacus", "pytorch-ood", "liger-kernel",
    "cut-cross-entropy",
)  # fmt: skip
Row = dict[str, Any]


def row(case: Case, implementation: str) -> Row:
    """Return a row without times."""
    return {
        "case": case.name, "implementation": implementation, "median_s": None, "p10_s": None, "p90_s": None,
        "peak_bytes": None, "relative_to": case.against, "ratio": None, "correct": False, "error": None, "note": "",
    }  # fmt: skip


def add(folder: Path, table: str, rows: Sequence[Row], *, place: Place, floor: Floor) -> Path:
    """Add rows to a table's file, in place of those of the same case and implementation.

    Raises:
        ValueError: The file is of another machine, other versions or another seed.
    """
    machine = results_file.machine()
    name = torch.cuda.get_device_name() if place.device == "cuda" else f"{torch.get_num_threads()} threads"
    new: dict[str, Any] = {
        "machine": f"{machine}, {name}", "versions": results_file.versions(*PACKAGES),
        "revision": results_file.revision(), "seed": place.seed, "floor": dataclasses.asdict(floor),
        "cases": list(rows),
    }  # fmt: skip
    path = folder / f"{table}.json"
    if path.exists():
        old = json.loads(path.read_text())
        for key in ("machine", "versions", "seed"):
            if old[key] != new[key]:
                raise ValueError(f"{key} of {path} must be {new[key]!r} to be extended; it was {old[key]!r}")
        renewed = {(r["case"], r["implementation"]) for r in rows}
        kept = [r for r in old["cases"] if (r["case"], r["implementation"]) not in renewed]
        new["cases"] = kept + new["cases"]
    medians = {(r["case"], r["implementation"]): r["median_s"] for r in new["cases"]}
    for one in new["cases"]:
        base = medians.get((one["case"], one["relative_to"]))
        one["ratio"] = one["median_s"] / base if one["median_s"] and base else None
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(new, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    return path
