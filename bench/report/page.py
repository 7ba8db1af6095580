"""The page of a benchmark: one Markdown table, the floors, who is ahead, and the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import floor, results_file
from bench.report import figures
from bench.report.document import Row
from bench.report.standing import best, grouped, ours, standing
from bench.report.units import between, duration, size


def table(cases: Sequence[Row]) -> str:
    """One row an implementation: times, peak memory, ratio to the yardstick, and how much slower than fastgrad."""
    shown = []
    for case, group in grouped(cases).items():
        mine = best(group)
        for row in group:
            timed = row["median_s"] is not None
            faster = mine and timed and not ours(row["implementation"])
            shown.append({
                "case": case, "implementation": row["implementation"],
                "median": duration(row["median_s"]) if row["correct"] else "not accepted or not correct",
                "p10 to p90": between(row) if timed else "-", "peak memory": size(row["peak_bytes"]),
                "ratio": "-" if row["ratio"] is None else f"{row['ratio']:.3g}", "to": row["relative_to"],
                "fastgrad is faster by": f"{row['median_s'] / mine['median_s']:.3g}" if faster else "",
            })  # fmt: skip
    return results_file.table(shown)


def environment(report: Mapping[str, Any]) -> str:
    """Machine, versions, revision, seed and the measured floors in two lines."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    line = f"{report['machine']}; {versions}; revision {report['revision']}; seed {report['seed']}."
    best_rates = floor.read(report["cases"])
    if best_rates is None:
        return line
    rates = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in best_rates.matrix_per_s.items())
    copy = f"{best_rates.copy_bytes_per_s / 1e9:.3g} GB/s"
    call = duration(best_rates.launch_s)
    return f"{line}\n\nMeasured floors: copy {copy}, matrix product {rates}, smallest call {call}."


def markdown(
    name: str, report: Mapping[str, Any], notes: Sequence[str] = (), pictures: Sequence[str] = ()
) -> str:
    """The report's page."""
    parts = [f"# Benchmark: {name}", environment(report), standing(report["cases"]), table(report["cases"])]
    if notes:
        parts.append("Not timed, and why:\n\n" + "\n".join(f"- {note}" for note in notes))
    parts += [f"![{Path(figure).stem}]({figure})" for figure in pictures]
    return "\n\n".join(parts) + "\n"


def write(
    folder: Path, name: str, report: Mapping[str, Any], notes: Sequence[str] = (), draw: bool = True
) -> Path:
    """Write ``<name>.json``, ``<name>.md`` and, where matplotlib is there, the figures; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    kept = sorted(found.name for found in folder.glob(f"{name}-*.png"))
    drawn = figures.draw(folder, name, report) if draw else kept
    page = folder / f"{name}.md"
    older = []
    if page.exists():
        fresh = {note.split(":", 1)[0] for note in notes}
        timed = {f"{r['case']}, {r['implementation']}" for r in report["cases"] if not r["correct"]}
        for line in page.read_text().splitlines():
            key = line[2:].split(":", 1)[0]
            if line.startswith("- ") and key in timed and key not in fresh:
                older.append(line[2:])
    page.write_text(markdown(name, report, [*older, *notes], drawn))
    return path
