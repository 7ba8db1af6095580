"""Tables of the detection rows: protocol blocks, methods by groups of cases, the strongest rival of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.report.figures import OTHERS, OURS, TEXT, stacked
from bench.report.text import table

Row = Mapping[str, Any]
PROTOCOLS = ("clean data only", "with generated challenges", "with labelled challenges")


def ours(method: str) -> bool:
    """Whether a method is fastgrad's."""
    return method.startswith("fastgrad")


def published(method: str) -> bool:
    """Whether a method is a published detector."""
    return not ours(method) and "(control)" not in method


def networks(rows: Sequence[Row]) -> list[str]:
    """Return the networks with results, in order."""
    return list(dict.fromkeys(row["network"] for row in rows if "method" in row))


def means(rows: Sequence[Row], merit: str, network: str, protocol: str) -> dict[str, dict[str, Row]]:
    """Return by method and group the mean over draws, or why there is none."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if (row.get("network"), row.get("protocol")) == (network, protocol) and not _lone(row):
            found.setdefault(row["method"], {}).setdefault(_group(row), []).append(row)
    return {
        method: {group: _joined(own, merit) for group, own in groups.items()}
        for method, groups in found.items()
    }


def _lone(row: Row) -> bool:
    return not row["case"].startswith(("mean of ", "worst of "))


def _group(row: Row) -> str:
    return str(row["case"]).removeprefix("mean of ")


def _joined(rows: Sequence[Row], merit: str) -> Row:
    absent = [row["not run"] for row in rows if "not run" in row]
    if absent:
        # Never a mean over the draws that are left.
        return {"not run": "; ".join(dict.fromkeys(absent))}
    value = float(np.mean([row[merit] for row in rows]))
    joined: dict[str, Any] = {merit: round(value, 4)}
    if len(rows) > 1:
        return joined | {"spread": round(float(np.std([row[merit] for row in rows], ddof=1)), 4)}
    return joined | ({"interval": rows[0]["interval"]} if rows[0].get("interval") else {})


def block(rows: Sequence[Row], merit: str, network: str, protocol: str, methods: Mapping[str, Any]) -> str:
    """Return a Markdown table of one protocol, best first, and what was not run with its reason."""
    found = means(rows, merit, network, protocol)
    groups = list(dict.fromkeys(group for own in found.values() for group in own))
    better = 1 if merit == "auroc" else -1

    def place(method: str) -> float:
        # A row that lacks a group comes last: its mean would be of other groups.
        values = [found[method].get(group, {}).get(merit) for group in groups]
        return float("inf") if None in values else -better * float(np.mean(values))

    lines, left = [], []
    for method in sorted(found, key=place):
        cells = [found[method].get(group, {"not run": ""}) for group in groups]
        year, paper = methods.get(method, ("", ""))
        if all("not run" in cell for cell in cells):
            left.append(
                {
                    "method": method,
                    "year": year,
                    "not run": "; ".join(dict.fromkeys(c["not run"] for c in cells if c["not run"])),
                }
            )
            continue
        lines.append(
            {"method": method, "year": year}
            | dict(zip(groups, map(_cell, cells), strict=True))
            | {"paper": paper}
        )
    heads = {"method": "method", "year": "year"} | {group: group for group in groups} | {"paper": "source"}
    parts = [table(lines, heads)] if lines else []
    if left:
        parts.append("Not run:\n\n" + table(left))
    return "\n\n".join(parts)


def _cell(value: Row) -> str:
    if "not run" in value:
        return "not run"
    merit = next(key for key in value if key in ("auroc", "aurc"))
    if "spread" in value:
        return f"{value[merit]:.3f} ± {value['spread']:.3f}"
    if "interval" in value:
        return "{:.3f} [{:.3f}, {:.3f}]".format(value[merit], *value["interval"])
    return f"{value[merit]:.3f}"


def strongest(rows: Sequence[Row], merit: str, network: str) -> str:
    """Return for every group the best published detector beside fastgrad's from clean data, and the default."""
    clean = means(rows, merit, network, PROTOCOLS[0])
    generated = means(rows, merit, network, PROTOCOLS[1])
    pick = max if merit == "auroc" else min
    lines = []
    for group in dict.fromkeys(group for own in clean.values() for group in own):
        rivals = {
            m: own[group][merit] for m, own in clean.items() if published(m) and merit in own.get(group, {})
        }
        mine = {
            m: own[group][merit]
            for m, own in (clean | generated).items()
            if ours(m) and merit in own.get(group, {})
        }
        control = {
            m: own[group][merit]
            for m, own in generated.items()
            if m.startswith("published") and merit in own.get(group, {})
        }
        if not rivals:
            continue
        best = pick(rivals, key=lambda m, rivals=rivals: rivals[m])  # type: ignore[misc]
        line = {"group": group, "strongest published": f"{best} {rivals[best]:.3f}"}
        line |= {m: f"{value:.3f}" for m, value in mine.items()} | {
            m: f"{value:.3f}" for m, value in control.items()
        }
        lines.append(line)
    heads = {key: key for line in lines for key in line}
    return table(lines, heads)


def bars(rows: Sequence[Row], merit: str) -> Any:
    """Return the figure: by group the strongest rivals of the first network beside fastgrad's."""
    if not networks(rows):
        return None
    network = networks(rows)[0]
    found: dict[str, dict[str, Row]] = {}
    for protocol in PROTOCOLS:
        found |= means(rows, merit, network, protocol)
    groups = [g for g in dict.fromkeys(g for own in found.values() for g in own) if "MEAD" not in g]
    pick = max if merit == "auroc" else min
    rivals = []
    for group in groups:
        values = {
            m: own[group][merit] for m, own in found.items() if published(m) and merit in own.get(group, {})
        }
        if values:
            rivals.append(pick(values, key=lambda m, values=values: values[m]))  # type: ignore[misc]
    shown = [m for m in found if ours(m)] + list(
        dict.fromkeys([*rivals, *(["softmax"] if "softmax" in found else [])])
    )
    shown = [m for m in shown if all(merit in found[m].get(group, {}) for group in groups)]
    if not shown:
        return None
    mine = [m for m in shown if ours(m)]
    colours = dict(zip(mine, OURS * 3, strict=False))
    # Softmax, which most figures show, has the same colour in all; no two of one figure share theirs.
    others = sorted((m for m in shown if not ours(m)), key=lambda m: (m != "softmax", m))
    colours |= dict(zip(others, OTHERS * 6, strict=False))
    blocks = {group: [(m, found[m][group][merit]) for m in shown] for group in groups}
    made, panel = stacked(blocks, colours, ".3f")
    panel.set_xlabel("AUROC" if merit == "auroc" else "area under the risk-coverage curve", fontsize=TEXT)
    panel.set_title(network, fontsize=TEXT)
    return made
