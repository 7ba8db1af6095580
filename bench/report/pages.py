"""The page of a table: a template over its JSON.

``bench/report/pages/NAME.md.j2`` makes ``NAME.md``; speed cases without a template of their own have ``speed.md.j2``. A
template has the JSON's keys and the functions of `bench.report.text` and `bench.report.speed`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from bench import results_file
from bench.report import detection, figures, speed, text
from bench.report.text import Row
from bench.results_file import RESULTS

TEMPLATES = Path(__file__).parent / "pages"


def page(name: str, document: Mapping[str, Any], pictures: list[str]) -> str | None:
    """Return the page of a document; None where no template is meant for it."""
    import jinja2

    kind = "speed" if "cases" in document else "detection" if "merit" in document else name
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.globals |= vars(text) | vars(speed) | vars(detection)
    # A document of detection has networks of its own.
    environment.globals |= {"detection_networks": detection.networks, "protocols": detection.PROTOCOLS}
    try:
        template = environment.select_template([f"{name}.md.j2", f"{kind}.md.j2"])
    except jinja2.TemplatesNotFound:
        return None
    return template.render(**document, name=name, pictures=pictures, environment=text.environment(document))


def save(
    name: str, rows: Sequence[Row], *, packages: Sequence[str], folder: Path = RESULTS,
    facts: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write rows with machine, versions, revision and facts as a JSON file, and its page; returns the page's path."""
    results_file.store(folder / f"{name}.json", {**results_file.origin(packages), **(facts or {}), "rows": list(rows)})
    return write(name, folder)


def command(
    name: str, doc: str | None, measure: Callable[..., Iterable[Row]], networks: Iterable[str] = (), *,
    packages: Sequence[str], facts: Mapping[str, Any] | None = None, **options: Mapping[str, Any],
) -> None:  # fmt: skip
    """Run the command line of a table: keep the rows that ``measure`` yields, of each network where there are several.

    ``measure`` takes a network, where there are several, and the options by name; each option has what argparse says of
    it. ``facts`` is what the page says beside the rows.
    """
    found = results_file.parser(doc, networks)
    for option, how in options.items():
        found.add_argument(f"--{option}", **how)
    given = vars(found.parse_args())
    folder, chosen = given.pop("out"), given.pop("networks", None)
    warnings.simplefilter("ignore")
    calls = [(network,) for network in chosen] if networks else [()]
    rows = results_file.printed(chain.from_iterable(measure(*one, **given) for one in calls))
    save(name, rows, packages=packages, folder=folder, facts=facts)


def add(
    name: str,
    rows: Sequence[dict[str, Any]],
    device: str,
    *,
    packages: Sequence[str],
    folder: Path,
    facts: Mapping[str, Any],
) -> None:
    """Add rows of speed to a table's JSON file, in place of those of the same case and implementation.

    ``{"machine", "versions", "revision", "seed", "floor", "cases": [{"case", "implementation", "median_s", "p10_s",
    "p90_s", "peak_bytes", "relative_to", "ratio", "correct", "note"}]}``, where ``ratio`` is the median over that of
    ``relative_to`` in the same case; times are null where an implementation was not correct or did not accept the task.

    Raises:
        ValueError: The file is of another machine, other versions or another seed.
    """
    new: dict[str, Any] = {**results_file.origin(packages, device), **facts}
    path, old = folder / f"{name}.json", {"cases": []}
    if path.exists():
        old = json.loads(path.read_text())
        for key in ("machine", "versions", "seed"):
            if old[key] != new[key]:
                raise ValueError(f"{key} of {path} must be {new[key]!r} to be extended; it was {old[key]!r}")
    cases = {(row["case"], row["implementation"]): row for row in (*old["cases"], *rows)}
    for row in cases.values():
        base = cases.get((row["case"], row["relative_to"]), {}).get("median_s")
        row["ratio"] = row["median_s"] / base if row["median_s"] and base else None
    results_file.store(path, {**new, "cases": list(cases.values())})


def write(name: str, folder: Path = RESULTS) -> Path:
    """Write the page, if there is a template, and the figure of a JSON file; returns the page's path."""
    document = json.loads((folder / f"{name}.json").read_text())
    drawn, path = None, folder / f"{name}.md"
    if "cases" in document:
        drawn = figures.draw(document["cases"])
    elif "merit" in document:
        drawn = detection.bars(document["rows"], document["merit"], document["networks"])
    elif "epochs" in document:
        drawn = figures.over_epochs(document["rows"], document["epochs"])
    if drawn is not None:
        drawn.savefig(folder / f"{name}.png", dpi=figures.DPI)
    if rendered := page(name, document, [f"{name}.png"] if drawn is not None else []):
        path.write_text(rendered)
    return path
