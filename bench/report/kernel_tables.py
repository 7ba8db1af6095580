"""The table of the kernels: machine code as compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.harness import results_file


def compiled(rows: Sequence[dict[str, Any]]) -> str:
    """Kernels by architecture: the largest registers, shared memory and spills, the fewest wide accesses."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    summary = []
    for (kernel, arch), group in groups.items():
        wide = [r for r in group if r["expects_wide"]]
        products = [r for r in group if r["expects_matrix"]]
        summary.append(
            {
                "kernel": kernel,
                "arch": arch,
                "cases": len(group),
                "registers": max(r["registers"] for r in group),
                "spills": max(r["spills"] for r in group),
                "shared": max(r["shared"] for r in group),
                "loads": min((r["wide_loads"] for r in wide), default=None),
                "stores": min((r["wide_stores"] for r in wide), default=None),
                "matrix": min((r["matrix"] for r in products), default=None),
            }
        )
    heads = {
        "kernel": "kernel", "arch": "architecture", "cases": "cases", "registers": "most registers",
        "spills": "spills", "shared": "most shared bytes", "loads": "fewest 16-byte loads",
        "stores": "fewest 16-byte stores", "matrix": "fewest matrix instructions",
    }  # fmt: skip
    return results_file.table(summary, heads)
