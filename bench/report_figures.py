"""The figures of a benchmark, drawn from its report alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import harness_floor, report

#: A colour for each implementation, the same in every figure; fastgrad's stand out.
_OURS = ["#c1272d", "#e8703a", "#f0a04b"]
_OTHERS = [
    "#1f4e79", "#5b8db8", "#6a9a5b", "#8c6bb1", "#7f7f7f", "#b8a13a", "#3b9c9c", "#a05a7a", "#2f2f2f", "#a9c9e8",
    "#b5d6a7", "#c9b3dd", "#6b4a2b",
]  # fmt: skip
Bars = list[tuple[str, list[tuple[str, float]]]]


def draw(folder: Path, name: str, document: Mapping[str, Any]) -> list[str]:
    """Draw what the report's cases allow; returns file names. Without matplotlib: nothing, and it says so."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        print("no figures: matplotlib is not installed")
        return []
    mpl.use("Agg")
    cases = list(document["cases"])
    colours = _colours(cases)
    drawn = []
    plans: list[tuple[str, Callable[[list[report.Row], dict[str, str]], Any]]] = [
        ("speedup", _speedup), ("memory", _memory), ("cost", _cost),
    ]  # fmt: skip
    figures = {f"{name}-scaling": _scaling(cases, colours)}
    tasks: dict[str, list[report.Row]] = {}
    for row in cases:
        tasks.setdefault(_task(row["case"]), []).append(row)
    for kind, plan in plans:
        for task, rows in sorted(tasks.items()):
            figures["-".join(filter(None, (name, task, kind)))] = plan(rows, colours)
    for file, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{file}.png", dpi=130, bbox_inches="tight")
            drawn.append(f"{file}.png")
    return drawn


def _task(case: str) -> str:
    """What is computed, for cases that are named by it and their sizes (``uniform target B=8 N=10``)."""
    first, sizes, _ = case.partition(" B=")
    return first.replace(" ", "-") if sizes and "N" in _sizes(case) else ""


def _ordered(cases: Sequence[report.Row]) -> list[tuple[str, list[report.Row]]]:
    """Cases by classes, then samples, where they have both; others as they come."""

    def key(item: tuple[str, list[report.Row]]) -> tuple[int, int]:
        sizes = _sizes(item[0])
        return (sizes["N"], sizes["B"]) if "N" in sizes else (0, 0)

    return sorted(report.grouped(cases).items(), key=key)


def _colours(cases: Sequence[report.Row]) -> dict[str, str]:
    names = list(dict.fromkeys(r["implementation"] for r in cases))
    mine = [n for n in names if report.ours(n)]
    others = [n for n in names if not report.ours(n)]
    found = {n: _OURS[i % len(_OURS)] for i, n in enumerate(mine)}
    return found | {n: _OTHERS[i % len(_OTHERS)] for i, n in enumerate(others)}


def _sizes(case: str) -> dict[str, int]:
    return {letter: int(number) for letter, number in re.findall(r"\b([A-Z])=(\d+)", case)}


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _scaling(cases: list[report.Row], colours: dict[str, str]) -> Any:
    """Time of the contrasts task against N (at the batch with most N) and against B (at the N with most B)."""
    rows = [
        r for r in cases
        if r["case"].startswith("contrasts ") and r["median_s"] and r["case"].endswith(("float32", "bfloat16"))
    ]  # fmt: skip
    points = {(s["B"], s["N"]) for s in (_sizes(r["case"]) for r in rows)}
    if len(points) < 3:
        return None
    main = _dtype(rows[0]["case"])
    rows = [r for r in rows if _dtype(r["case"]) == main]
    figure, panels = _figure(11, 4.2, 2)
    floor = harness_floor.read(cases)
    for panel, along, fixed in ((panels[0], "N", "B"), (panels[1], "B", "N")):
        value = _commonest([_sizes(case)[fixed] for case in {r["case"] for r in rows}])
        for name in dict.fromkeys(r["implementation"] for r in rows):
            line = sorted(
                (_sizes(r["case"])[along], r["median_s"]) for r in rows
                if r["implementation"] == name and _sizes(r["case"])[fixed] == value
            )  # fmt: skip
            if line:
                style = {"linewidth": 2.4} if report.ours(name) else {"linewidth": 1.2}
                panel.plot(*zip(*line, strict=True), "o-", color=colours[name], label=name, **style)
        if floor is not None:
            panel.plot(
                *zip(*_floor_line(rows, floor, along, fixed, value), strict=True), "k:",
                label="floor: bytes over measured copy rate",
            )  # fmt: skip
        panel.set(
            xscale="log",
            yscale="log",
            xlabel=f"{along} ({'classes' if along == 'N' else 'samples'})",
            ylabel="seconds",
        )
        panel.set_title(f"all contrasts, {fixed} = {value}, {main}")
        panel.grid(True, which="major", alpha=0.3)
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), fontsize=7, loc="outside lower center", ncols=4)
    return figure


def _dtype(case: str) -> str:
    return case.split()[-1]


def _commonest(values: list[int]) -> int:
    return max(sorted(set(values)), key=lambda v: (values.count(v), -v))


def _floor_line(
    rows: list[report.Row], floor: harness_floor.Floor, along: str, fixed: str, value: int
) -> list[tuple[int, float]]:
    from bench.micro.last_layer import work

    line = {}
    for case in {r["case"] for r in rows}:
        sizes = _sizes(case)
        if sizes[fixed] == value:
            moved, _ = work("contrasts", (sizes["B"], sizes["N"], sizes["D"]), getattr(torch, _dtype(case)))
            line[sizes[along]] = max(floor.seconds(moved), floor.launch_s)
    return sorted(line.items())


def _bars(
    groups: Bars,
    colours: dict[str, str],
    label: str,
    *,
    log: bool,
    line: bool,
) -> Any:
    """Horizontal bars, a block for each case."""
    if not groups:
        return None
    count = sum(len(bars) for _, bars in groups)
    figure, (panel,) = _figure(9, 1.2 + 0.2 * count + 0.22 * len(groups))
    place, ticks, names, seen = 0.0, [], [], set()
    for case, bars in groups:
        start = place
        for name, value in bars:
            panel.barh(place, value, color=colours[name], label=None if name in seen else name, height=0.9)
            panel.annotate(f" {value:.3g}", (value, place), va="center", fontsize=7)
            seen.add(name)
            place += 1
        ticks.append((start + place - 1) / 2)
        names.append(case)
        place += 1.1
    panel.set_yticks(ticks, names, fontsize=7)
    # No more room above and below than between two blocks.
    panel.set_ylim(place - 0.5, -1.1)
    if log:
        panel.set_xscale("log")
    if line:
        panel.axvline(1.0, color="black", linewidth=0.8)
    panel.set_xlabel(label)
    panel.margins(x=0.12)
    panel.grid(True, axis="x", alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    return figure


def _speedup(cases: list[report.Row], colours: dict[str, str]) -> Any:
    groups = []
    for case, group in _ordered(cases):
        mine = report.best(group)
        bars = [
            (r["implementation"], r["median_s"] / mine["median_s"]) for r in group
            if mine and r["median_s"] and not report.ours(r["implementation"])
        ]  # fmt: skip
        if bars:
            groups.append((case, bars))
    return _bars(groups, colours, "time over fastgrad's: right of 1, fastgrad is faster", log=True, line=True)


def _memory(cases: list[report.Row], colours: dict[str, str]) -> Any:
    groups = []
    for case, group in _ordered(cases):
        bars = [(r["implementation"], r["peak_bytes"] / 2**20) for r in group if r["peak_bytes"]]
        if bars:
            groups.append((case, bars))
    return _bars(groups, colours, "peak memory of one call, MiB", log=True, line=False)


def _cost(cases: list[report.Row], colours: dict[str, str]) -> Any:
    """Time over that of a forward pass, where the case has one."""
    groups = []
    for case, group in _ordered(cases):
        base = [r["median_s"] for r in group if r["implementation"] in ("forward", "network alone")]
        if base and base[0]:
            bars = [(r["implementation"], r["median_s"] / base[0]) for r in group if r["median_s"]]
            groups.append((case, bars))
    return _bars(groups, colours, "time over that of a forward pass", log=True, line=True)
