"""Tables and figures of detection: protocol blocks, methods by groups of cases, the strongest rival of each group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bench.report.figures import Lines, Value, dots
from bench.report.speed import ours
from bench.report.text import Row, table, wilson

#: Attacks of the families by which challenges are made, and of others. IterLL is BIM towards another class, and
#: Semantic is the challenge `inversion`.
GENERATED, OTHERS, AFTER = ("FGSM", "PGD", "BIM", "IterLL", "Semantic"), ("C&W", "DeepFool"), " after JPEG"
PROTOCOLS = ("clean data only", "with generated challenges", "with labelled challenges")


def published(method: str) -> bool:
    return not ours(method) and not method.startswith("published")


def measured_networks(rows: Sequence[Row]) -> list[str]:
    """Return the networks with results, in order."""
    return list(dict.fromkeys(row["network"] for row in rows if "method" in row))


def means(rows: Iterable[Row], merit: str, network: str, protocol: str) -> dict[str, dict[str, Row]]:
    """Return by method and group the mean over draws, or why there is none."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        own = (row.get("network"), row.get("protocol")) == (network, protocol)
        if own and "group" in row and (merit in row or "not run" in row):
            found.setdefault(row["method"], {}).setdefault(row["group"], []).append(row)
    return {method: {group: _joined(own, merit) for group, own in groups.items()} for method, groups in found.items()}


def _joined(rows: Sequence[Row], merit: str) -> Row:
    absent = [row["not run"] for row in rows if "not run" in row]
    if absent:
        # A mean over the remaining draws would not be comparable.
        return {"not run": "; ".join(dict.fromkeys(absent))}
    value = float(np.mean([row[merit] for row in rows]))
    joined: dict[str, Any] = {merit: round(value, 4)}
    # An attack that misleads no input in a draw is left out of that draw's mean.
    if held := sorted({row["cases"] for row in rows if "cases" in row}):
        joined["kinds"] = "-".join(map(str, dict.fromkeys((held[0], held[-1]))))
    if len(rows) > 1:
        return joined | {"spread": round(float(np.std([row[merit] for row in rows], ddof=1)), 4)}
    return joined | ({"interval": rows[0]["interval"]} if "interval" in rows[0] and merit in ("auroc", "gain") else {})


def block(rows: Sequence[Row], merit: str, network: str, protocol: str, methods: Mapping[str, Any]) -> str:
    """Return a Markdown table of one protocol, best first, and the methods that were not run with their reasons."""
    found = means(rows, merit, network, protocol)
    groups = list(dict.fromkeys(group for own in found.values() for group in own))
    sign = -1 if merit == "auroc" else 1

    def place(method: str) -> float:
        # A row that lacks a group comes last, because its mean would be over other groups.
        return float(np.mean([sign * found[method].get(group, {}).get(merit, sign * np.inf) for group in groups]))

    lines, left = [], []
    for method in sorted(found, key=place):
        cells = {group: found[method].get(group, {"not run": ""}) for group in groups}
        year, paper = methods.get(method, ("", ""))
        if all("not run" in cell for cell in cells.values()):
            why = dict.fromkeys(cell["not run"] for cell in cells.values() if cell["not run"])
            left.append({"method": method, "year": year, "not run": "; ".join(why)})
        else:
            shown = {group: _cell(cell, merit) for group, cell in cells.items()}
            lines.append({"method": method, "year": year, **shown, "source": paper})
    return "\n\n".join(filter(None, (table(lines), "Not run:\n\n" + table(left) if left else "")))


def _cell(value: Row, merit: str) -> str:
    if "not run" in value:
        return "not run"
    form = {"aurc": ".0f", "gain": "+.3f"}.get(merit, ".3f")
    text = f"{value[merit]:{form}}"
    if "spread" in value:
        return f"{text} ± {value['spread']:{form.lstrip('+')}}"
    if "interval" in value:
        return text + " [{:{form}}, {:{form}}]".format(*value["interval"], form=form)
    return text


def gains(rows: Sequence[Row], network: str) -> str:
    """Return the gain by a block over a form of fastgrad, by group, with its interval or its spread over draws."""
    own = [{**row, "protocol": "", "group": row["case"].removeprefix("gain in ")} for row in rows if "gain" in row]
    found = means(own, "gain", network, "")
    return table(
        {"method": method} | {group: _cell(cell, "gain") for group, cell in groups.items()}
        for method, groups in found.items()
    )


def attack_kinds(rows: Iterable[Row]) -> list[Row]:
    """Return a row for each half of a group of attacks: those of kinds that challenges are made by, and others."""
    halves: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        name = row.get("case", "").removesuffix(AFTER)
        if name.startswith(GENERATED + OTHERS):
            kinds = "of generated kinds" if name.startswith(GENERATED) else "of other kinds"
            group = f"attacks {kinds}{AFTER if row['case'].endswith(AFTER) else ''}"
            key = (row["network"], str(row["draw"]), row["method"], row["protocol"], group)
            halves.setdefault(key, []).append(row)
    found: list[Row] = []
    for (*_, group), own in halves.items():
        values = [row["auroc"] for row in own if "auroc" in row]
        head = {name: own[0][name] for name in ("network", "draw", "method", "protocol")} | {"group": group}
        if values:
            found.append(head | {"auroc": float(np.mean(values)), "cases": len(values)})
        else:
            found.append(head | {"not run": own[0]["not run"]})
    return found


def strongest(rows: Sequence[Row], merit: str, network: str) -> str:
    """Return for every group the best published detector from clean data, beside fastgrad's and the control."""
    return table(_strongest(rows, merit, network))


def _strongest(rows: Sequence[Row], merit: str, network: str) -> Iterator[dict[str, str]]:
    rows = [*rows, *attack_kinds(rows)]
    clean = means(rows, merit, network, PROTOCOLS[0])
    generated = means(rows, merit, network, PROTOCOLS[1])
    for group in dict.fromkeys(group for own in clean.values() for group in own):
        values = {m: own[group] for m, own in (clean | generated).items() if merit in own.get(group, {})}
        rivals = {m: cell[merit] for m, cell in values.items() if published(m)}
        if rivals:
            best = max(rivals, key=rivals.__getitem__)
            beside = [m for m in values if (ours(m) and " + " not in m) or m.startswith("published")]
            yield (
                {"group": group, "kinds": values[best].get("kinds", "")}
                | {"strongest published": f"{best} {_cell(values[best], merit)}"}
                | {m: _cell(values[m], merit) for m in sorted(beside, key=lambda m: (not ours(m), m))}
            )


def overview(document: Row, networks: Sequence[str], groups: Sequence[str]) -> str:
    """Return the rows of `strongest` for several networks and groups, by group."""
    lines = [
        {"group": line["group"], "network": titled(document, network)} | line
        for network in networks for line in _strongest(document["rows"], document["merit"], network)
    ]  # fmt: skip
    if absent := [group for group in groups if all(line["group"] != group for line in lines)]:
        raise ValueError(f"a table must name groups of {', '.join(networks)}; they were {absent}")
    return table(line for group in groups for line in lines if line["group"] == group)


def titled(document: Row, network: str) -> str:
    """Return a network's title, its standing (tuned on or validation), and whether its sets are small."""
    title, tuned = document["networks"][network]
    # The form of the risk was chosen with every network in view.
    risk = any(row.get("method") == "fastgrad, risk" for row in document["rows"])
    standing = "tuned on" if tuned else "validation but for the risk" if risk else "validation"
    return f"{title}, {standing}{', quick sizes' if document.get('quick') else ''}"


def by_group(document: Row) -> Any:
    """Return the figure: by group the strongest rivals and fastgrad, of the first network not tuned on.

    Of labelled challenges it has all detectors.
    """
    rows, merit = document["rows"], document["merit"]
    if not measured_networks(rows):
        return None
    network = min(measured_networks(rows), key=lambda name: document["networks"][name][1])
    found = {m: own for protocol in PROTOCOLS for m, own in means(rows, merit, network, protocol).items()}
    groups = [g for g in dict.fromkeys(g for own in found.values() for g in own) if "MEAD" not in g]
    # Of detectors that were trained on the case, each is a control of the others.
    labelled = {row["protocol"] for row in rows if "protocol" in row} == {PROTOCOLS[2]}
    shown = [m for m in found if labelled or (ours(m) and " + " not in m)]
    for group in groups:
        values = {m: own[group][merit] for m, own in found.items() if published(m) and merit in own.get(group, {})}
        shown += [max(values, key=values.__getitem__)] if values else []
    shown += [m for m in found if m == "softmax"]
    shown = [m for m in dict.fromkeys(shown) if all(merit in found[m].get(group, {}) for group in groups)]
    if not shown:
        return None
    lines = {group: [(m, [_with_ends(found[m][group], merit)]) for m in shown] for group in groups}
    how = "± one standard deviation" if "spread" in found[shown[0]][groups[0]] else "95 % intervals"
    return dots(lines, f"AUROC, {how}", line=(0.5, "chance"), titles=[titled(document, network)])


def _with_ends(cell: Row, merit: str) -> Value:
    value, spread = cell[merit], cell.get("spread", 0)
    return Value(f"{value:.3f}", value, *cell.get("interval", (value - spread, value + spread)))


def second_answers(document: Row) -> Any:
    """Return what each network gains by correction, H and two other methods, on clean inputs and on corruptions."""
    groups: dict[str, Lines] = {}
    methods = {
        "correction": "correction",
        "H on h, gated": "H, gated",
        "last layer, trained again, gated": "last layer again",
        "batch norm adapted": "batch norm adapted",
    }
    cases = {
        "clean": "clean",
        "corruptions like generated ones": "corrupted, like\nthe generated",
        "corruptions unlike generated ones": "corrupted, unlike\nthe generated",
    }
    for network, (title, _) in document["networks"].items():
        own = {(row.get("method"), row.get("case")): row for row in document["rows"] if row["network"] == network}
        lines = [(name, [_gain(own.get((method, case))) for case in cases]) for method, name in methods.items()]
        if lines := [(name, values) for name, values in lines if any(values)]:
            groups[title] = lines
    label = "gain in accuracy, per cent of the inputs, 95 % intervals"
    return dots(groups, label, line=(0, "the network alone"), titles=list(cases.values()))


def _gain(row: Row | None) -> Value | None:
    if row is None:
        return None
    return Value(f"{100 * row['gain']:+.1f}", *(100 * value for value in (row["gain"], *row["interval"])))


def found_attacks(document: Row) -> Any:
    """Return the share of misleading images that each detector finds: of AutoAttack, and of a detector-aware attack."""
    groups: dict[str, Lines] = {}
    for row in document["rows"]:
        names = [name for name in ("AutoAttack", "selective") if row.get(f"misled, {name}")]
        if names:
            head = f"{document['networks'][row['network']]}, {row['case']}, {row['method']}"
            groups[head] = [(name, [_found(row[f"found, {name}"], row[f"misled, {name}"])]) for name in names]
    label = "per cent of misleading images found, 95 % intervals"
    return dots(groups, label, line=(5, "false alarms"), titles=[""]) if groups else None


def _found(found: int, misled: int) -> Value:
    return Value(f"{found} of {misled}", *(100 * value for value in (found / misled, *wilson(found, misled))))
