"""Rows of the tables: means over seeds and cases, from which nothing is left out without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench import results_file

#: AUROC by network (or draw), case and method.
Found = dict[tuple[str, str, str], float]
Rows = list[dict[str, Any]]


def detection_rows(found: Sequence[Found]) -> Rows:
    """Rows of a detection table from one mapping (network, case, method) -> AUROC per seed.

    ``auroc`` is the mean over seeds, ``spread`` the standard deviation between them.

    Raises:
        ValueError: A seed lacks a cell that another seed of the network has, or a number is not finite.
    """
    rows = []
    networks = [{network for network, _, _ in mapping} for mapping in found]
    for key in dict.fromkeys(key for mapping in found for key in mapping):
        network, case, method = key
        values = [m.get(key, np.nan) for m, own in zip(found, networks, strict=True) if network in own]
        if not np.isfinite(values).all():
            raise ValueError(
                f"{method} on {case} of {network} must be a number for every seed; it was {values}"
            )
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        mean = round(float(np.mean(values)), 4)
        row = {"network": network, "case": case, "method": method, "auroc": mean, "spread": round(spread, 4)}
        rows.append(row | {"seeds": len(values)})
    return rows


def mean_rows(rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> Rows:
    """One row for each method and group of cases: the means of AUROC and of spread over the group's cases.

    Raises:
        ValueError: A method has not as many numbers for a group as the others.
    """
    found = []
    for name, cases in groups.items():
        cells: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["case"] in cases:
                cells.setdefault(row["method"], []).append(row)
        count = max((len(own) for own in cells.values()), default=0)
        for method, own in cells.items():
            if len(own) != count:
                raise ValueError(
                    f"{method} must have all {count} numbers of {name} to be in a mean; it had {len(own)}"
                )
            means = {key: float(np.mean([row[key] for row in own])) for key in ("auroc", "spread")}
            found.append({"case": name, "method": method, **means})
    return found


def precision(clean: int, other: int) -> str:
    """A sentence on how far chance moves one AUROC of so many images (Hanley and McNeil 1982)."""
    widths = []
    for area in (0.7, 0.9):
        first, second = area / (2 - area), 2 * area**2 / (1 + area)
        variance = area * (1 - area) + (other - 1) * (first - area**2) + (clean - 1) * (second - area**2)
        widths.append(100 * 1.96 * np.sqrt(variance / (clean * other)))
    return (
        f"{clean} clean images against {other} of a case: the 95 % interval of a single AUROC of 70 is "
        f"± {widths[0]:.1f}, of 90 ± {widths[1]:.1f}."
    )


def pivot(rows: Sequence[Mapping[str, Any]], cases: Sequence[str], methods: Sequence[str]) -> str:
    """A Markdown table with one line per method and one column per case, in hundredths, and their mean.

    Raises:
        ValueError: A method lacks a case: its mean would be of other cases than the others'.
    """
    table = []
    for method in methods:
        values = {row["case"]: row for row in rows if row["method"] == method and row["case"] in cases}
        if missing := [case for case in cases if case not in values]:
            raise ValueError(f"{method} must have every case to be in a mean; it lacks {', '.join(missing)}")
        line: dict[str, Any] = {"method": method}
        for case in cases:
            line[case] = f"{100 * values[case]['auroc']:.1f}"
            # One network alone has no spread.
            if values[case]["spread"]:
                line[case] += f" ± {100 * values[case]['spread']:.1f}"
        numbers = [row["auroc"] for row in values.values()]
        line["mean"] = f"**{100 * np.mean(numbers):.1f}**"
        line["worst"] = f"{100 * np.min(numbers):.1f}"
        table.append(line)
    return results_file.table(table)
