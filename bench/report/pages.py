"""A file of results, with machine, versions and revision at its head, and its page: a template over its JSON.

``bench/report/pages/NAME.md.j2`` makes ``NAME.md``; speed cases without a template of their own have ``speed.md.j2``. A
template has the JSON's keys and the functions of `bench.report.text` and `bench.report.speed`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from bench.report import conformance, detection, figures, speed, text
from bench.report.text import Row

TEMPLATES = Path(__file__).parent / "pages"
RESULTS = Path(__file__).parents[1] / "results"
#: Functions that draw the figure of a document, by a key of the document.
FIGURES: Mapping[str, Callable[[Row], Any]] = {
    "cases": figures.draw,
    "merit": detection.by_group,
    "splits": detection.second_answers,
    "steps": detection.found_attacks,
}


def parser(doc: str | None, networks: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return a parser with the option for the results' folder and, if there are several networks, for these."""
    found = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    if networks:
        found.add_argument("--networks", nargs="+", choices=list(networks), default=list(networks))
    found.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: bench/results)")
    return found


def machine() -> str:
    """Return processor, cores, memory and system."""
    listed = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", listed.read_text() if listed.exists() else "", re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def origin(packages: Sequence[str], *device: str) -> dict[str, Any]:
    """Return machine and device, versions of installed packages, and the commit, with a plus sign if files differ."""
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    # Only the commit's hash, even if there are tags.
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    revision = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()
    return {"machine": ", ".join([machine(), *device]), "versions": versions, "revision": revision}


def printed(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows, printing each as soon as it is there."""
    found = []
    for row in rows:
        found.append(row)
        print(row, file=sys.stderr, flush=True)
    return found


def store(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document as JSON, a line for each of its ``rows`` or, for speed, its ``cases``."""
    key = "cases" if "cases" in document else "rows"
    rows = ",\n  ".join(json.dumps(row) for row in document[key])
    head = json.dumps({name: value for name, value in document.items() if name != key}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "{key}": [\n  {rows}\n ]\n}}\n')
    print(f"wrote {path}", file=sys.stderr)


def page(name: str, document: Mapping[str, Any], pictures: list[str]) -> str | None:
    """Return the page of a document; None if there is no template for it."""
    import jinja2

    kind = "speed" if "cases" in document else "detection" if "merit" in document else name
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.globals |= vars(text) | vars(speed) | vars(detection) | vars(conformance)
    try:
        template = environment.select_template([f"{name}.md.j2", f"{kind}.md.j2"])
    except jinja2.TemplatesNotFound:
        return None
    # Figures that others published have no machine.
    measured = text.environment(document) if "versions" in document else ""
    return template.render(**document, name=name, pictures=pictures, environment=measured)


def save(
    name: str, rows: Sequence[Row], *, packages: Sequence[str], folder: Path = RESULTS,
    facts: Mapping[str, Any] | None = None, part: Sequence[str] = (), keys: Sequence[str] = ("network", "method"),
) -> Path:  # fmt: skip
    """Write rows with machine, versions, revision and facts as a JSON file, and its page; return the page's path.

    If ``part`` says what was run, the file's rows that differ from all of these in ``keys`` stay.
    """
    path = folder / f"{name}.json"
    document = {**origin(packages), **(facts or {}), "rows": list(rows)}
    store(path, joined(json.loads(path.read_text()), document, part, keys) if part and path.exists() else document)
    return write(name, folder)


def joined(
    old: Mapping[str, Any], new: Mapping[str, Any], part: Sequence[str], keys: Sequence[str] = ("network", "method")
) -> dict[str, Any]:
    """Return a document with the new rows in place of those of the same keys: networks and methods, as a rule.

    The old rows of a network stay if it could not be made this time. Networks and methods keep their order.
    """
    if old.get("quick") != new.get("quick"):
        raise ValueError(f"rows of one file must have one size; quick was {old.get('quick')} and {new.get('quick')}")
    known = {row.get("network") for row in old["rows"]}
    rows = [row for row in new["rows"] if "not run" not in row or "method" in row or row.get("network") not in known]
    made = {tuple(map(row.get, keys)) for row in rows}
    kept = [row for row in old["rows"] if tuple(map(row.get, keys)) not in made]
    seconds = {"seconds": old.get("seconds", new.get("seconds"))} if "seconds" in {*old, *new} else {}
    if not kept:
        return {**new, "rows": rows}
    order = {key: list(dict.fromkeys(row.get(key) for row in [*old["rows"], *rows])) for key in keys}
    together = sorted(kept + rows, key=lambda row: [order[key].index(row.get(key)) for key in keys])
    return {**old, **new, **_origins(old, new, part), **seconds, "rows": together}


def _origins(old: Mapping[str, Any], new: Mapping[str, Any], part: Sequence[str]) -> dict[str, Any]:
    machines = dict.fromkeys([*old["machine"].split("; "), new["machine"]])
    revision = f"{old['revision']}, {', '.join(part)} {new['revision']}"
    return {"machine": "; ".join(machines), "revision": revision}


def added(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document of speed with the implementations that a later run adds, each beside fastgrad's time there.

    Rows that were added before are replaced; all others stay.
    """
    stay = [row for row in old["cases"] if "beside_s" not in row]
    known, cases = {(row["case"], row["implementation"]) for row in stay}, {row["case"] for row in stay}
    mine = {case: speed.best(group) for case, group in speed.grouped(new["cases"]).items() if case in cases}
    rows = {
        (row["case"], row["implementation"]): row | {"beside_s": own["median_s"]}
        for row in new["cases"]
        if (row["case"], row["implementation"]) not in known and (own := mine.get(row["case"]))
    }
    if not rows:
        return dict(old)
    kept = [row for row in old["cases"] if (row["case"], row["implementation"]) not in rows]
    names = list(dict.fromkeys(name for _, name in rows))
    versions = {**old["versions"], **new["versions"]}
    return {**old, **_origins(old, new, names), "versions": versions, "cases": [*kept, *rows.values()]}


def command(
    name: str, doc: str | None, measure: Callable[..., Iterable[Row]], networks: Iterable[str] = (), *,
    packages: Sequence[str], facts: Mapping[str, Any] | None = None, keys: Sequence[str] = (),
    **options: Mapping[str, Any],
) -> None:  # fmt: skip
    """Run the command line of a table: save the rows that ``measure`` yields, for each network if there are several.

    ``measure`` takes a network, if there are several, and the options by name; an option's value holds its arguments
    for argparse. ``facts`` go into the file beside the rows. If ``keys`` tell rows apart, those that are not measured
    this time stay in the file.
    """
    found = parser(doc, networks)
    for option, how in options.items():
        found.add_argument(f"--{option}", **how)
    given = vars(found.parse_args())
    folder, chosen = given.pop("out"), given.pop("networks", None)
    warnings.simplefilter("ignore")
    calls = [(network,) for network in chosen] if networks else [()]
    rows = printed(chain.from_iterable(measure(*one, **given) for one in calls))
    part = [f"{len(rows)} rows"] if keys else []
    save(name, rows, packages=packages, folder=folder, facts=facts, part=part, keys=keys)


def draw(document: Row) -> Any:
    """Return the figure of a document, or None."""
    return next((draw(document) for key, draw in FIGURES.items() if key in document), None)


def write(name: str, folder: Path = RESULTS) -> Path:
    """Write the page, if there is a template, and the figure of a JSON file; return the page's path."""
    document = json.loads((folder / f"{name}.json").read_text())
    path = folder / f"{name}.md"
    drawn = draw(document)
    if drawn is not None:
        drawn.savefig(folder / f"{name}.png", dpi=figures.DPI)
    if rendered := page(name, document, [f"{name}.png"] if drawn is not None else []):
        path.write_text(rendered)
    return path
