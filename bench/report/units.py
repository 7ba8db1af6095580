"""Numbers as a reader wants them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def duration(seconds: float | None) -> str:
    """Three significant digits and a unit."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def between(row: Mapping[str, Any]) -> str:
    """From the tenth to the ninetieth percentile of a row's times."""
    return f"{duration(row['p10_s'])} to {duration(row['p90_s'])}"


def size(count: int | None) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    if count is None:
        return "-"
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def sizes(case: str) -> dict[str, int]:
    """The sizes in a case's name: ``{"B": 8, "N": 10}`` of ``contrasts B=8 N=10``."""
    return {letter: int(number) for letter, number in re.findall(r"\b([A-Z])=(\d+)", case)}
