"""The page of a table: a template over its JSON.

``bench/report/pages/NAME.md.j2`` makes ``NAME.md``; speed cases without a template of their own have ``speed.md.j2``. A
template has the JSON's keys and the functions of `bench.report.text` and `bench.report.speed`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import results_file
from bench.report import detection, figures, speed, text
from bench.results_file import RESULTS

TEMPLATES = Path(__file__).parent / "pages"


def page(name: str, document: Mapping[str, Any], pictures: list[str]) -> str | None:
    """Return the page of a document; None where no template is meant for it."""
    import jinja2

    kind = "speed" if "cases" in document else "detection" if "merit" in document else None
    own = (TEMPLATES / f"{name}.md.j2").exists()
    if not own and kind is None:
        return None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    functions = (
        text.duration, text.size, text.table, text.pivot, text.spread,
        speed.tables, speed.grouped, speed.best, speed.ours,
        detection.block, detection.gains, detection.strongest,
    )  # fmt: skip
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"detection_networks": detection.networks, "protocols": detection.PROTOCOLS}
    template = environment.get_template(f"{name}.md.j2" if own else f"{kind}.md.j2")
    return template.render(
        **document, name=name, document=document, pictures=pictures, environment=text.environment(document)
    )


def save(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    packages: Sequence[str],
    folder: Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write rows with machine, versions, revision and facts as a JSON file, and its page; returns the page's path."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        "machine": results_file.machine(), "versions": results_file.versions(*packages),
        "revision": results_file.revision(),
    }  # fmt: skip
    document = {**head, **(facts or {}), "rows": list(rows)}
    (folder / f"{name}.json").write_text(results_file.dump(document))
    path = write(name, folder)
    print(f"wrote {path.with_suffix('')}.json and .md", file=sys.stderr)
    return path


def write(name: str, folder: Path = RESULTS) -> Path:
    """Write the page, if there is a template, and the figure of a JSON file; returns the page's path."""
    document = json.loads((folder / f"{name}.json").read_text())
    pictures = []
    drawn = None
    if "cases" in document:
        drawn = figures.draw(document["cases"])
    elif "merit" in document:
        drawn = detection.bars(document["rows"], document["merit"])
    if drawn is not None:
        drawn.savefig(folder / f"{name}.png", dpi=figures.DPI)
        pictures.append(f"{name}.png")
    rendered = page(name, document, pictures)
    path = folder / f"{name}.md"
    if rendered is not None:
        path.write_text(rendered)
    return path
