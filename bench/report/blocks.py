"""The marked blocks of README and documentation, filled from ``bench/results``: no figure is typed by hand.

    <!-- table: network -->
    ...
    <!-- end -->
    ResNet-18 takes <!-- value: network | ResNet-18 32x32 B=64 bce ones | fastgrad | ratio | .2f -->0.81<!-- end -->

- A table is that of the JSON file of the same name. Words after the name of a speed table keep the cases that contain
  them. ``environment network`` is the line of machine, versions, revision and floors.
- After the name of a detection table stand its networks: for each group the strongest published detector, beside
  fastgrad's. For several networks the groups follow: ``attacks resnet18, vit | attacks | attacks after JPEG``.
- ``NAME by network | CASE | FIELD | FORMAT | METHOD | METHOD ...`` is one field of one case: a row for each network, a
  column for each method. ``NAME by case | NETWORK | ...`` has a row for each case; of speed, without a network.
- ``NAME across | METHOD | FORMAT | NETWORK | NETWORK ...`` has a row for each case and a column for each network; the
  format names fields: ``{inside:.2f} ({width:.0f})``. ``NAME means | FIELD | FORMAT`` has a row for each method and a
  column for each group, with the mean over its cases.
- A value is ``FILE | CASE or NETWORK: CASE | IMPLEMENTATION, METHOD or ARCHITECTURE | FIELD | FORMAT``, over draws the
  mean. In a row of a table ``;`` stands in place of ``|``, which would end the cell. A format is one of Python's,
  ``size`` for bytes or ``duration`` for seconds.
- A range is ``FILES | CASE | METHOD | FIELD | FORMAT``: the least and the largest value over the networks of the files,
  whose names have spaces between them. A case with ``*`` names several.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.report import detection, speed
from bench.report.pages import RESULTS
from bench.report.text import duration, environment, size
from bench.report.text import table as markdown

BLOCK = re.compile(r"<!-- (table|value|range): ([^>]+?) -->(.*?)<!-- end -->", re.DOTALL)


def load(name: str, folder: Path) -> dict[str, Any]:
    """Return a file of results, or raise a ValueError that names the files that exist."""
    path = folder / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise ValueError(f"a block must name one of {known}; it was {name!r}")
    return _parsed(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _parsed(path: Path, changed: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(words: str, folder: Path = RESULTS) -> str:
    """Return the Markdown of a table block; ``words`` is the text after ``table:``."""
    name, _, rest = words.strip().partition(" ")
    if name == "environment":
        return environment(load(rest, folder))
    document = load(name, folder)
    kind, *parts = (part.strip() for part in rest.split("|"))
    if kind.startswith("by "):
        return grid(document, kind.removeprefix("by "), *parts)
    if kind in APART:
        return APART[kind](document, *parts)
    if "merit" in document:
        networks, *groups = (part.strip() for part in rest.split("|"))
        if groups:
            return detection.overview(document, networks.split(", "), groups)
        return detection.strongest(document["rows"], document["merit"], networks)
    return speed.tables(document["cases"], rest) if "cases" in document else markdown(document["rows"])


def grid(document: dict[str, Any], index: str, fixed: str, key: str, form: str, *methods: str) -> str:
    """Return the Markdown of one field: a row for each network or case, a column for each method."""
    other = {"network": "case", "case": "network"}[index]
    rows = [row for row in document.get("cases", document.get("rows")) if row.get(other, "") == fixed]
    lines = []
    for each in dict.fromkeys(row[index] for row in rows if key in row):
        network, case = (each, fixed) if index == "network" else (fixed, each)
        title = detection.titled(document, each) if index == "network" else each
        lines.append({"": title} | {m: _figure(rows, network, case, m, key, form) for m in methods})
    if absent := [m for m in methods if not any(line[m] for line in lines)]:
        raise ValueError(f"a table by {index} must name methods with {key!r} of {fixed!r}; they were {absent}")
    return markdown(lines)


def across(document: dict[str, Any], method: str, form: str, *networks: str) -> str:
    """Return the Markdown of a method's fields: a row for each case, a column for each network."""
    titles = {network: document["networks"][network][0] for network in networks}
    own = [
        row for row in document["rows"] if row.get("method") == method and row["network"] in networks and "case" in row
    ]
    lines = {case: {"": case} for case in dict.fromkeys(row["case"] for row in own)}
    for network in networks:
        for row in own:
            if row["network"] == network:
                lines[row["case"]][network] = form.format(**row)
    return markdown(lines.values(), {"": "", **titles})


def means(document: dict[str, Any], key: str, form: str) -> str:
    """Return the Markdown of the means of a field over the cases of a group: a row for each method."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in document["rows"]:
        if "group" in row and key in row:
            found.setdefault(row["method"], {}).setdefault(row["group"], []).append(row[key])
    return markdown(
        {"": method} | {group: format(statistics.fmean(own), form) for group, own in groups.items()}
        for method, groups in found.items()
    )


#: Tables of a kind of their own, by the word after the file's name.
APART = {"across": across, "means": means}


def value(words: str, folder: Path = RESULTS) -> str:
    """Return the text of a value block; ``words`` is the text after ``value:``, and must name a number."""
    parts = [part.strip() for part in re.split("[|;]", words)]
    if len(parts) != 5:
        raise ValueError(f"a value must be FILE | CASE | IMPLEMENTATION | FIELD | FORMAT; it was {words!r}")
    name, case, method, key, form = parts
    network, _, case = case.rpartition(": ")
    document = load(name, folder)
    rows = document.get("cases", document.get("rows"))
    if "merit" in document:
        # Halves of the attacks are means that no row holds.
        rows = [*rows, *({**row, "case": f"mean of {row['group']}"} for row in detection.attack_kinds(rows))]
    found = _figure(rows, network, case, method, key, form)
    if found is None:
        raise ValueError(f"a value must name a case and an implementation of {name}; it was {words!r}")
    return found


def span(words: str, folder: Path = RESULTS) -> str:
    """Return the text of a range block; ``words`` is the text after ``range:``."""
    names, case, method, key, form = (part.strip() for part in re.split("[|;]", words))
    found = []
    for name in names.split():
        drawn: dict[tuple[str, str], list[float]] = {}
        for row in load(name, folder)["rows"]:
            if row.get("method") == method and key in row and fnmatch(row.get("case", ""), case):
                drawn.setdefault((row["network"], row["case"]), []).append(row[key])
        found += [statistics.fmean(values) for values in drawn.values()]
    if not found:
        raise ValueError(f"a range must name a case and a method of {names}; it was {words!r}")
    return f"{min(found):{form}} to {max(found):{form}}"


def _figure(rows: list[dict[str, Any]], network: str, case: str, method: str, key: str, form: str) -> str | None:
    found = [
        row for row in rows
        if str(row.get("case", row.get("batch", ""))) == case and network in ("", row.get("network"))
        and method in map(row.get, ("implementation", "method", "form", "arch"))
    ]  # fmt: skip
    if not found:
        return None
    drawn = "draw" in found[0] and len(found) > 1
    value = statistics.fmean(row[key] for row in found) if drawn else found[0][key]
    return UNITS[form](value) if form in UNITS else format(value, form)


#: Formats that choose a unit.
UNITS: Mapping[str, Callable[[Any], str]] = {"size": size, "duration": duration}
#: Blocks inside a sentence or a cell, by their kind.
INLINE = {"value": value, "range": span}


def fill(text: str, folder: Path = RESULTS) -> str:
    """Return a document with its blocks made anew."""

    def one(match: re.Match[str]) -> str:
        kind, words = match[1], match[2].strip()
        made = f"\n\n{table(words, folder)}\n\n" if kind == "table" else INLINE[kind](words, folder)
        return f"<!-- {kind}: {words} -->{made}<!-- end -->"

    return BLOCK.sub(one, text)


def differing(text: str, folder: Path = RESULTS) -> list[str]:
    """Return the names of the blocks whose content differs from the results."""
    pairs = zip(BLOCK.finditer(text), BLOCK.finditer(fill(text, folder)), strict=True)
    return [f"{old[1]}: {old[2]}" for old, new in pairs if old[3].strip() != new[3].strip()]
