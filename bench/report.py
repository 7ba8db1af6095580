"""The report of a benchmark: one JSON file, and the Markdown table made from it.

    {"machine", "versions", "revision", "seed", "cases": [{"case", "implementation", "median_s", "p10_s", "p90_s",
     "peak_bytes", "relative_to", "ratio", "correct"}]}

``ratio`` is the median over that of ``relative_to`` in the same case; times are null where an implementation was not
correct or did not accept the task. The floors are cases too (``floor: ...``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import harness_floor, results_file
from bench.harness import Result

#: Implementations that are yardsticks or neighbours: they do less than the task, so nothing is claimed against them.
YARDSTICKS = {
    "torch.softmax", "linear alone", "training step", "forward", "network alone", "Liger fused linear loss",
    "Cut Cross-Entropy", "stored rows", "torch.copy_", "torch.mm", "torch.add_",
}  # fmt: skip
#: Medians closer than this are not told apart.
NOISE = 1.02
#: Peers that are right on the timed inputs but have no correct digit once a sample is confident (margin 20).
TEXTBOOK = {
    "closed form, textbook", "closed form, torch.compile", "linear, softmax, closed form", "the same, torch.compile",
}  # fmt: skip
PACKAGES = (
    "torch", "triton", "numpy", "torchvision", "backpack-for-pytorch", "opacus", "pytorch-ood", "liger-kernel",
    "cut-cross-entropy",
)  # fmt: skip
Row = dict[str, Any]


def ours(implementation: str) -> bool:
    """Whether an implementation is fastgrad's."""
    return implementation.startswith("fastgrad")


def rows(results: Iterable[Result]) -> list[Row]:
    """Results as the JSON's cases."""
    results = list(results)
    medians = {(r.case, r.implementation): r.quantile(0.5) for r in results}
    found = []
    for r in results:
        median, base = medians[r.case, r.implementation], medians.get((r.case, r.relative_to))
        found.append(
            {
                "case": r.case,
                "implementation": r.implementation,
                "median_s": median,
                "p10_s": r.quantile(0.1),
                "p90_s": r.quantile(0.9),
                "peak_bytes": r.peak_bytes,
                "relative_to": r.relative_to,
                "ratio": median / base if median and base else None,
                "correct": r.correct,
            }
        )
    return found


def document(results: Iterable[Result], seed: int, device: str) -> dict[str, Any]:
    """The whole report."""
    machine = results_file.machine()
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}; {machine}"
    else:
        machine = f"{machine}, {torch.get_num_threads()} threads"
    return {
        "machine": machine,
        "versions": results_file.versions(*PACKAGES),
        "revision": results_file.revision(),
        "seed": seed,
        "cases": rows(results),
    }


def merge(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A report with the new one's cases in place of those of the same name; the environment must be the same."""
    for key in ("machine", "versions", "seed"):
        if old[key] != new[key]:
            raise ValueError(f"{key} of the report to be extended must be {new[key]!r}; it was {old[key]!r}")
    renewed = {row["case"] for row in new["cases"]}
    kept = [row for row in old["cases"] if row["case"] not in renewed]
    return {**new, "cases": kept + new["cases"]}


def duration(seconds: float | None) -> str:
    """Three significant digits and a unit."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(count: int | None) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    if count is None:
        return "-"
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def grouped(cases: Sequence[Row], floors: bool = False) -> dict[str, list[Row]]:
    """The rows of each case, in order; without the floors unless asked for."""
    found: dict[str, list[Row]] = {}
    for row in cases:
        if floors or not row["case"].startswith("floor:"):
            found.setdefault(row["case"], []).append(row)
    return found


def best(group: Sequence[Row]) -> Row | None:
    """The fastest of fastgrad's implementations of a case's task.

    End to end they do different things; there the one that does what the peer does is the whole network's.
    """
    timed = [
        r for r in group
        if ours(r["implementation"]) and r["median_s"]
        and ("," not in r["implementation"] or r["implementation"] == "fastgrad, whole network")
    ]  # fmt: skip
    return min(timed, key=lambda r: r["median_s"]) if timed else None


def behind(cases: Sequence[Row], textbook: bool = False) -> list[str]:
    """Where a peer is faster than fastgrad, one line each; the textbook forms only and alone if asked for."""
    lines = []
    for case, group in grouped(cases).items():
        mine = best(group)
        for row in group:
            name = row["implementation"]
            peer = name in TEXTBOOK if textbook else not ours(name) and name not in YARDSTICKS | TEXTBOOK
            if mine and peer and row["median_s"] and NOISE * row["median_s"] < mine["median_s"]:
                lines.append(f"{case}: {name} is {mine['median_s'] / row['median_s']:.2f} times faster")
    return lines


def standing(cases: Sequence[Row]) -> str:
    """The lines above every table: ahead of every peer, or where not."""
    late, inaccurate = behind(cases), behind(cases, textbook=True)
    text = (
        "fastgrad is behind in: " + "; ".join(late) + "."
        if late
        else (
            "fastgrad is ahead of every peer in every case below."
            if not inaccurate
            else "fastgrad is ahead of every peer that keeps its accuracy."
        )
    )
    if inaccurate:
        factors = [float(line.rsplit(" is ", 1)[1].split()[0]) for line in inaccurate]
        text += (
            f"\n\nFaster than fastgrad in {len(factors)} comparisons, by up to {max(factors):.2g} times, is the form "
            "`(||p||^2 - 2 p_k + 1)(||h||^2 + 1)` as one writes it down first, eager or compiled; it has no correct "
            "digit for samples that the network is sure of, and is not timed where the inputs hold such a sample."
        )
    return text


def table(cases: Sequence[Row]) -> str:
    """One row an implementation: times, peak memory, ratio to the yardstick, and how much slower than fastgrad."""
    lines = [
        "| case | implementation | median | p10 to p90 | peak memory | ratio | to | fastgrad is faster by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, group in grouped(cases).items():
        mine = best(group)
        for row in group:
            faster = ""
            if mine and row["median_s"] and not ours(row["implementation"]):
                faster = f"{row['median_s'] / mine['median_s']:.3g}"
            spread = f"{duration(row['p10_s'])} to {duration(row['p90_s'])}" if row["median_s"] else "-"
            state = duration(row["median_s"]) if row["correct"] else "not accepted or not correct"
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3g}"
            cells = (
                case, row["implementation"], state, spread, size(row["peak_bytes"]), ratio, row["relative_to"], faster,
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def environment(report: Mapping[str, Any]) -> str:
    """Machine, versions, revision, seed and the measured floors in two lines."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    line = f"{report['machine']}; {versions}; revision {report['revision']}; seed {report['seed']}."
    floor = harness_floor.read(report["cases"])
    if floor is None:
        return line
    rates = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in floor.matrix_per_s.items())
    copy = f"{floor.copy_bytes_per_s / 1e9:.3g} GB/s"
    call = duration(floor.launch_s)
    return f"{line}\n\nMeasured floors: copy {copy}, matrix product {rates}, smallest call {call}."


def markdown(
    name: str, report: Mapping[str, Any], notes: Sequence[str] = (), figures: Sequence[str] = ()
) -> str:
    """The report's page."""
    parts = [f"# Benchmark: {name}", environment(report), standing(report["cases"]), table(report["cases"])]
    if notes:
        parts.append("Not timed, and why:\n\n" + "\n".join(f"- {note}" for note in notes))
    parts += [f"![{Path(figure).stem}]({figure})" for figure in figures]
    return "\n\n".join(parts) + "\n"


def write(
    folder: Path, name: str, report: Mapping[str, Any], notes: Sequence[str] = (), draw: bool = True
) -> Path:
    """Write ``<name>.json``, ``<name>.md`` and, where matplotlib is there, the figures; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    figures: list[str] = []
    if draw:
        from bench import report_figures

        figures = report_figures.draw(folder, name, report)
    else:
        figures = sorted(found.name for found in folder.glob(f"{name}-*.png"))
    page = folder / f"{name}.md"
    older = []
    if page.exists():
        fresh = {note.split(":", 1)[0] for note in notes}
        timed = {f"{r['case']}, {r['implementation']}" for r in report["cases"] if not r["correct"]}
        for line in page.read_text().splitlines():
            key = line[2:].split(":", 1)[0]
            if line.startswith("- ") and key in timed and key not in fresh:
                older.append(line[2:])
    page.write_text(markdown(name, report, [*older, *notes], figures))
    return path
