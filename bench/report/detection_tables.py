"""Tables of what the evaluation (``bench/paper``) measured: AUROC by method, means over cases and networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.text import table as markdown_table

Rows = Sequence[Mapping[str, Any]]
#: Tables with cases that every method without labels has, and the heading of each.
GROUPS = {"adversarial": "attacks", "ood": "CIFAR-10, other sets", "corruption": "corruptions"}


def summary(tables: Mapping[str, Rows]) -> str:
    """Mean AUROC of every method that saw no labels over attacks, other sets and corruptions.

    A case is an attack, a set or a corruption (mean over severities), a mean over networks; the last columns
    are the mean over all cases and the lowest.

    Args:
        tables: The rows of each table of `GROUPS`.

    Raises:
        ValueError: A method lacks some cases of a group: its mean would be of other cases than the others'.
    """
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for name, head in GROUPS.items():
        for row in tables[name]:
            case = row["case"].partition("/")[0]
            if not any(word in case for word in ("after JPEG", "grey")):
                group = "digits, other sets" if row["network"].startswith("mnist") else head
                found.setdefault(row["method"], {}).setdefault((group, case), []).append(row["auroc"])
    heads = list(dict.fromkeys(group for cases in found.values() for group, _ in cases))
    # A method that lacks a whole group needs labels or images and would be compared on other terms.
    whole = {m: cases for m, cases in found.items() if {group for group, _ in cases} == set(heads)}
    every: dict[tuple[str, str], int] = {}
    for cases in whole.values():
        every |= {key: max(len(values), every.get(key, 0)) for key, values in cases.items()}
    lines = []
    for method, cases in whole.items():
        for key, count in every.items():
            if len(cases.get(key, ())) != count:
                raise ValueError(
                    f"{method} must have {count} numbers for {key[1]!r}, as others have, to be in a mean"
                )
        means = {key: sum(values) / len(values) for key, values in cases.items()}
        lowest = min(means, key=lambda key, means=means: means[key])  # type: ignore[misc]
        line = {"method": method}
        for head in heads:
            own = [value for (group, _), value in means.items() if group == head]
            line[head] = f"{sum(own) / len(own):.3f}"
        line["all cases"] = f"{sum(means.values()) / len(means):.3f}"
        line["lowest"] = f"{means[lowest]:.3f} ({lowest[1]})"
        lines.append(line)
    lines.sort(key=lambda line: line["all cases"], reverse=True)
    return markdown_table(lines)


def labelled(attacks: Rows, others: Rows) -> str:
    """Mean AUROC over the attacks, for each network, of every method that is trained on the attack itself.

    Args:
        attacks: The rows of ``adversarial``.
        others: Those of ``ood``, whose methods need no labels.

    Raises:
        ValueError: A method lacks some of the attacks.
    """
    # Mahalanobis P needs images and so has no row among the other sets; it needs no labels either.
    unlabelled = {row["method"] for row in others} | {"Mahalanobis P"}
    attacks = [row for row in attacks if "after JPEG" not in row["case"]]
    cases = {row["case"] for row in attacks}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in attacks:
        if row["method"] not in unlabelled:
            found.setdefault(row["method"], {}).setdefault(row["network"], {})[row["case"]] = row["auroc"]
    lines = []
    for method, networks in found.items():
        for network, values in networks.items():
            if missing := cases - set(values):
                raise ValueError(
                    f"{method} must have {', '.join(sorted(missing))} on {network} to be in a mean"
                )
        means = {network: sum(values.values()) / len(values) for network, values in networks.items()}
        lines.append(
            {"trained on labelled attacks": method} | {n: f"{mean:.3f}" for n, mean in means.items()}
        )
    return markdown_table(lines)


def detection(rows: Rows) -> str:
    """AUROC, a row for each network and case, a column for each method."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        shown = f"{row['auroc']:.3f}"
        if row.get("spread"):
            shown += f" ± {row['spread']:.3f}"
        groups.setdefault((row["network"], row["case"]), {})[row["method"]] = shown
    table_rows = [{"network": n, "case": c, **cells} for (n, c), cells in groups.items()]
    return markdown_table(table_rows, {key: key for key in ("network", "case", *methods)})
