"""The marked blocks of README and documentation, filled from ``bench/results``: no figure is typed by hand.

A block is a table or a single number:

    <!-- table: network -->
    ...
    <!-- end -->
    ResNet-18 takes <!-- value: network | ResNet-18 32x32 B=64 bce ones | fastgrad | ratio -->0.81<!-- end --> steps.

- A table is that of the JSON file of the same name. Words after the name keep the rows that have them: in their case's
  name where it is a speed table, as a value elsewhere. ``<!-- table: environment network -->`` is the line of machine,
  versions, revision and floors of a file. Of a detection table the words are the network: its strongest published
  detector for each group, beside fastgrad's.
- A value is ``FILE | CASE or NETWORK: CASE | IMPLEMENTATION or METHOD | FIELD`` with an optional format (default
  ``.3g``). In a row of a table ``;`` stands in place of ``|``, which would end the cell. FIELD is a key of the row, or
  ``faster``, the factor by which fastgrad's fastest form beats it, or ``per second``.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from bench.report import detection, speed
from bench.report.text import environment
from bench.report.text import table as markdown
from bench.results_file import RESULTS

BLOCK = re.compile(r"<!-- (table|value): ([^>]+?) -->(.*?)<!-- end -->", re.DOTALL)


def load(name: str, folder: Path) -> dict[str, Any]:
    """Return a file of results.

    Raises:
        ValueError: There is none of that name.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise ValueError(f"a block must name one of {known}; it was {name!r}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(words: str, folder: Path = RESULTS) -> str:
    """Return the Markdown of a table block; ``words`` is what stands after ``table:``."""
    name, _, rest = words.strip().partition(" ")
    if name == "environment":
        return environment(load(rest, folder))
    document = load(name, folder)
    if "merit" in document:
        return detection.strongest(document["rows"], document["merit"], rest)
    if "cases" in document:
        return speed.tables(document["cases"], rest)
    rows = [r for r in document["rows"] if not rest or rest in map(str, r.values())]
    if not rows:
        raise ValueError(f"{name} must have rows with {rest!r}; it had none")
    return markdown(rows)


def value(words: str, folder: Path = RESULTS) -> str:
    """Return the text of a value block; ``words`` is what stands after ``value:``.

    Raises:
        ValueError: The words do not name a number of the results.
    """
    parts = [part.strip() for part in re.split("[|;]", words)]
    if len(parts) not in (4, 5):
        raise ValueError(f"a value must be FILE | CASE | IMPLEMENTATION | FIELD; it was {words!r}")
    name, case, implementation, key = parts[:4]
    document = load(name, folder)
    network, _, case = case.rpartition(": ")
    group = [r for r in document.get("cases", document.get("rows", [])) if r.get("case") == case]
    group = [r for r in group if network in ("", r.get("network"))]
    rows = [r for r in group if implementation in (r.get("implementation"), r.get("method"))]
    if not rows:
        raise ValueError(f"a value must name a case and an implementation of {name}; it was {words!r}")
    if key == "faster":
        mine = speed.best(group)
        if mine is None or not rows[0]["median_s"]:
            raise ValueError(f"a factor needs two timed implementations; it was {words!r}")
        number = rows[0]["median_s"] / mine["median_s"]
    elif key == "per second":
        number = speed.batch(case) / rows[0]["median_s"]
    else:
        # Over draws the mean, if all have the number.
        number = (
            rows[0][key]
            if len(rows) == 1 or "draw" not in rows[0]
            else statistics.fmean(r[key] for r in rows)
        )
    return format(number, parts[4] if len(parts) == 5 else ".3g")


def fill(text: str, folder: Path = RESULTS) -> str:
    """Return a document with its blocks made anew."""

    def one(match: re.Match[str]) -> str:
        kind, words = match[1], match[2].strip()
        if kind == "table":
            return f"<!-- table: {words} -->\n\n{table(words, folder)}\n\n<!-- end -->"
        return f"<!-- value: {words} -->{value(words, folder)}<!-- end -->"

    return BLOCK.sub(one, text)


def differing(text: str, folder: Path = RESULTS) -> list[str]:
    """Return the names of the blocks whose content is not what the results say."""
    fresh = fill(text, folder)
    pairs = zip(BLOCK.finditer(text), BLOCK.finditer(fresh), strict=True)
    return [f"{old[1]}: {old[2]}" for old, new in pairs if old[3].strip() != new[3].strip()]
