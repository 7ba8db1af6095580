"""Write a result as JSON (with machine, versions and revision) and the Markdown table made from it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """One line: processor, cores, memory, system."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of the named packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """The commit the checkout stands at, with a plus sign if files differ from it."""
    root = Path(__file__).parents[1]
    run = lambda *args: subprocess.run(  # noqa: E731
        ["git", *args], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """A Markdown table; ``columns`` maps a row's keys to the headings, which without it are those of the first row."""
    if not rows:
        return ""
    columns = {key: key for key in rows[0]} if columns is None else columns
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"
    return str(value)


def dump(document: Mapping[str, Any]) -> str:
    """Return a document as JSON, a line for each of its rows."""
    rows = ",\n  ".join(json.dumps(row) for row in document["rows"])
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a JSON list of rows."""
    path.write_text(json.dumps([*load(path), row], indent=1))


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list; none if there is no file.

    Raises:
        ValueError: The file is damaged; the message names it.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else []  # type: ignore[no-any-return]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be a whole JSON file; it cannot be read ({error})") from error


def write(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    sections: Sequence[tuple[str, str]],
    *,
    mode: str,
    packages: Sequence[str] = ("torch", "numpy"),
    folder: Path | None = None,
) -> None:
    """Write ``<name>.json`` and ``<name>.md``; ``sections`` are pairs of (text, table)."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    head = {"machine": machine(), "versions": versions(*packages), "revision": revision(), "mode": mode}
    (folder / f"{name}.json").write_text(json.dumps({**head, "rows": list(rows)}, indent=1) + "\n")
    versions_line = ", ".join(f"{key} {value}" for key, value in head["versions"].items())  # type: ignore[union-attr]
    parts = [f"# {title}", f"{head['machine']}; {versions_line}; revision {head['revision']}; {mode} mode."]
    for text, rendered in sections:
        parts += [text, rendered]
    (folder / f"{name}.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    print(f"wrote {folder / name}.json and .md", file=sys.stderr)
