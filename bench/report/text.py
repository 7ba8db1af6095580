"""Format numbers and tables for readers."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def digits(value: float) -> str:
    """Return three significant digits, or all digits of a whole number below 10,000."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e4 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return three significant digits and a unit."""
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{digits(seconds * factor)} {unit}"


def size(count: int | None) -> str:
    """Return bytes in the largest unit that keeps a digit before the point."""
    if count is None:
        return "-"
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{digits(value)} {units[0]}"


def sizes(case: str) -> dict[str, int]:
    """Return the sizes in a case's name: ``{"B": 8, "N": 10}`` of ``contrasts B=8 N=10``."""
    return {letter: int(number) for letter, number in re.findall(r"\b([A-Z])=(\d+)", case)}


def table(rows: Iterable[Row], columns: Mapping[str, str] | None = None) -> str:
    """Return a Markdown table; ``columns`` maps keys to headings, by default all keys in order of appearance."""
    rows = list(rows)
    if not rows:
        return ""
    columns = columns or {key: key for row in rows for key in row}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def pivot(rows: Iterable[Row], index: Sequence[str], column: str, value: str, form: str = "") -> str:
    """Return a Markdown table with a column for every value of ``column``, in order of appearance."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[key] for key in index), {key: row[key] for key in index})
        line[row[column]] = format(row[value], form)
    return table(lines.values())


def share(value: float, count: int) -> str:
    """Return a share of ``count`` with its 95 % interval."""
    low, high = wilson(round(value * count), count)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def wilson(found: int, count: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of the share ``found / count`` (Wilson, 1927)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    middle, half = found + z**2 / 2, z * math.sqrt(found * (count - found) / count + z**2 / 4)
    return (middle - half) / (count + z**2), (middle + half) / (count + z**2)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return digits(value) if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"
    # An error's message may have lines and bars.
    return str(value).replace("\n", " ").replace("|", r"\|")


def environment(document: Mapping[str, Any]) -> str:
    """Return machine, versions, revision, seed and measured rates in two lines."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    line = f"{document['machine']}; {versions}; revision {document['revision']}"
    line += f"; seed {document['seed']}." if "seed" in document else "."
    if floor := document.get("floor"):
        rates = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in floor["matrix_per_s"].items())
        line += f"\n\nMeasured floors: copy {floor['copy_bytes_per_s'] / 1e9:.3g} GB/s, matrix product {rates}, "
        line += f"smallest call {duration(floor['launch_s'])}."
    return line
