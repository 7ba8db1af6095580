"""Fill the marked blocks of README.md and of pages in docs/ from ``bench/results``: no figure is typed by hand.

    python -m bench.report.readme            # rewrite them all
    python -m bench.report.readme --check    # exit status 1 and a list if a block differs
    python -m bench.report.readme --names    # the tables there are

A block is a table or a single number:

    <!-- table: network -->
    ...
    <!-- end -->
    ResNet-18 takes <!-- value: network | ResNet-18 32x32 B=64 bce ones | fastgrad | ratio -->0.81<!-- end --> steps.

Tables, each made from the file of the same name in ``bench/results``:

- ``last-layer``, ``network``, ``rows``, ``end-to-end``, ``quick``: what ``fastgrad bench`` wrote. A first line says
  whether fastgrad is ahead of every peer, or where not; then one table a task, a row a case: fastgrad's time, peak
  memory and ratio to the yardstick, and by how much it is faster than each of the others. Words after the name keep
  the cases that contain them: ``<!-- table: last-layer contrasts -->``. ``<!-- table: environment network -->`` is the
  line of machine, versions, revision and floors of a file.
- ``compile``: the machine code of each kernel, the worst of its cases (``python -m bench.gpu.compile_report --out``).
- ``detection``: AUROC by method from ``adversarial``, ``ood`` and ``corruption``, a mean for each group of cases.
- ``labelled``: AUROC of the methods trained on labelled attacks, a mean over the attacks for each network. Both take
  the files of another network where its name follows: ``<!-- table: detection resnet18 -->``.
- any other file with ``rows``, those of ``bench/paper`` included: detection rows as cases against methods (AUROC),
  everything else as it is. Words after the name keep the rows in which a value equals them.

A value of ``detection`` is ``detection | COLUMN | METHOD | auroc``, a cell of that table. Every other value is
``FILE | CASE | IMPLEMENTATION or METHOD | FIELD`` with an optional fifth part, a Python format (default ``.3g``):
FIELD is a key of the case (times in seconds), or ``faster``, the factor by which fastgrad's fastest form beats it,
or ``per second``, B of the case over the median.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.harness import results_file
from bench.report.detection_tables import GROUPS, detection, labelled, summary
from bench.report.kernel_tables import compiled
from bench.report.page import environment
from bench.report.speed_tables import batch, measured
from bench.report.standing import best

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "docs/results.md", "docs/explanation/what-it-finds.md")]
BLOCK = re.compile(r"<!-- (table|value): ([^>]+?) -->(.*?)<!-- end -->", re.DOTALL)


def load(name: str, folder: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ValueError: There is none of that name.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise ValueError(f"a README block must name one of {known}; it was {name!r}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(words: str, folder: Path = results_file.RESULTS) -> str:
    """The Markdown of a table block; ``words`` is what stands after ``table:``."""
    name, _, rest = words.strip().partition(" ")
    if name == "environment":
        return environment(load(rest, folder))
    if name == "detection":
        return summary({name: load(_of(name, rest), folder)["rows"] for name in GROUPS})
    if name == "labelled":
        return labelled(*(load(_of(name, rest), folder)["rows"] for name in ("adversarial", "ood")))
    document = load(name, folder)
    if "cases" in document and "seed" in document:
        return measured(document["cases"], rest)
    if name == "compile":
        return compiled(document["rows"])
    rows = [r for r in document["rows"] if not rest or rest in map(str, r.values())]
    if rows and {"network", "case", "method", "auroc"} <= set(rows[0]):
        return detection(rows)
    if not rows:
        raise ValueError(f"{name} must have rows with {rest!r}; it had none")
    return results_file.table(rows)


def _of(name: str, network: str) -> str:
    """The file of a table that was measured on another network than the small ones."""
    return f"{name}-{network}" if network else name


def value(words: str, folder: Path = results_file.RESULTS) -> str:
    """The text of a value block; ``words`` is what stands after ``value:``."""
    parts = [part.strip() for part in words.split("|")]
    if len(parts) not in (4, 5):
        raise ValueError(f"a value must be FILE | CASE | IMPLEMENTATION | FIELD; it was {words!r}")
    name, case, implementation, key = parts[:4]
    if name == "detection":
        tables = {file: load(file, folder)["rows"] for file in GROUPS}
        return cell(summary(tables), implementation, case)
    document = load(name, folder)
    group = [r for r in document.get("cases", document.get("rows", [])) if r.get("case") == case]
    rows = [r for r in group if implementation in (r.get("implementation"), r.get("method"))]
    if not rows:
        raise ValueError(f"a value must name a case and an implementation of {name}; it was {words!r}")
    row = rows[0]
    if key == "faster":
        mine = best(group)
        if mine is None or not row["median_s"]:
            raise ValueError(f"a factor needs two timed implementations; it was {words!r}")
        number = row["median_s"] / mine["median_s"]
    elif key == "per second":
        number = batch(case) / row["median_s"]
    else:
        number = row[key]
    return format(number, parts[4] if len(parts) == 5 else ".3g")


def cell(markdown: str, row: str, column: str) -> str:
    """The text of a Markdown table's cell, by the first word of its row and the heading of its column."""
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in markdown.splitlines()]
    for line in lines[2:]:
        if line[0] == row and column in lines[0]:
            return line[lines[0].index(column)]
    raise ValueError(f"a value must name a row and a column of its table; it was {row!r}, {column!r}")


def fill(text: str, folder: Path = results_file.RESULTS) -> str:
    """A document with its blocks made anew."""

    def one(match: re.Match[str]) -> str:
        kind, words = match[1], match[2].strip()
        if kind == "table":
            return f"<!-- table: {words} -->\n\n{table(words, folder)}\n\n<!-- end -->"
        return f"<!-- value: {words} -->{value(words, folder)}<!-- end -->"

    return BLOCK.sub(one, text)


def differing(text: str, folder: Path = results_file.RESULTS) -> list[str]:
    """The names of the blocks whose content is not what the results say."""
    fresh = fill(text, folder)
    pairs = zip(BLOCK.finditer(text), BLOCK.finditer(fresh), strict=True)
    return [f"{old[1]}: {old[2]}" for old, new in pairs if old[3].strip() != new[3].strip()]


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="bench.report.readme", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a block is out of date")
    parser.add_argument("--names", action="store_true", help="list the tables there are")
    parser.add_argument(
        "--file",
        type=Path,
        nargs="+",
        default=DOCUMENTS,
        help="default: README.md and the pages with results",
    )
    options = parser.parse_args(arguments)
    if options.names:
        print("\n".join(sorted(path.stem for path in results_file.RESULTS.glob("*.json"))))
        return 0
    stale: list[str] = []
    for file in options.file:
        text = file.read_text()
        try:
            stale += [f"{file.name}: {name}" for name in differing(text)]
            if not options.check:
                file.write_text(fill(text))
        except ValueError as error:
            print(f"bench.report.readme: {error}", file=sys.stderr)
            return 2
    for name in stale:
        print(f"{'out of date' if options.check else 'renewed'}: {name}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
