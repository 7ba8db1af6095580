"""The figures of a benchmark, drawn from its report alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import floor as floors
from bench.report.document import Row
from bench.report.standing import best, by_size, grouped, ours
from bench.report.units import sizes

#: A colour for each implementation, the same in every figure; fastgrad's stand out.
_OURS = ["#c1272d", "#e8703a", "#f0a04b"]
_OTHERS = [
    "#1f4e79", "#5b8db8", "#6a9a5b", "#8c6bb1", "#7f7f7f", "#b8a13a", "#3b9c9c", "#a05a7a", "#2f2f2f", "#a9c9e8",
    "#b5d6a7", "#c9b3dd", "#6b4a2b",
]  # fmt: skip


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
    figures = {f"{name}-scaling": _scaling(cases, colours)}
    tasks: dict[str, list[Row]] = {}
    for row in cases:
        tasks.setdefault(_task(row["case"]), []).append(row)
    for kind in BARS:
        for task, rows in sorted(tasks.items()):
            figures["-".join(filter(None, (name, task, kind)))] = _bars(rows, colours, kind)
    for file, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{file}.png", dpi=130, bbox_inches="tight")
            drawn.append(f"{file}.png")
    return drawn


def _task(case: str) -> str:
    """What is computed, for cases that are named by it and their sizes (``uniform target B=8 N=10``)."""
    first, more, _ = case.partition(" B=")
    return first.replace(" ", "-") if more and "N" in sizes(case) else ""


def _colours(cases: Sequence[Row]) -> dict[str, str]:
    names = list(dict.fromkeys(r["implementation"] for r in cases))
    mine = [n for n in names if ours(n)]
    others = [n for n in names if not ours(n)]
    found = {n: _OURS[i % len(_OURS)] for i, n in enumerate(mine)}
    return found | {n: _OTHERS[i % len(_OTHERS)] for i, n in enumerate(others)}


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _scaling(cases: list[Row], colours: dict[str, str]) -> Any:
    """Time of the contrasts task against N (at the batch with most N) and against B (at the N with most B)."""
    rows = [
        r for r in cases
        if r["case"].startswith("contrasts ") and r["median_s"] and r["case"].endswith(("float32", "bfloat16"))
    ]  # fmt: skip
    points = {(s["B"], s["N"]) for s in (sizes(r["case"]) for r in rows)}
    if len(points) < 3:
        return None
    main = _dtype(rows[0]["case"])
    rows = [r for r in rows if _dtype(r["case"]) == main]
    figure, panels = _figure(11, 4.2, 2)
    floor = floors.read(cases)
    for panel, along, fixed in ((panels[0], "N", "B"), (panels[1], "B", "N")):
        value = _commonest([sizes(case)[fixed] for case in {r["case"] for r in rows}])
        for name in dict.fromkeys(r["implementation"] for r in rows):
            line = sorted(
                (sizes(r["case"])[along], r["median_s"]) for r in rows
                if r["implementation"] == name and sizes(r["case"])[fixed] == value
            )  # fmt: skip
            if line:
                style = {"linewidth": 2.4} if ours(name) else {"linewidth": 1.2}
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
    rows: list[Row], floor: floors.Floor, along: str, fixed: str, value: int
) -> list[tuple[int, float]]:
    line = {}
    for case in {r["case"] for r in rows}:
        at = sizes(case)
        if at[fixed] == value:
            B, N, D, element = at["B"], at["N"], at["D"], getattr(torch, _dtype(case)).itemsize
            # Logits and features are read, norms written in float32.
            moved = B * N * (element + 4) + B * D * element
            line[at[along]] = max(floor.seconds(moved), floor.launch_s)
    return sorted(line.items())


def _over_ours(row: Row, group: Sequence[Row]) -> float | None:
    mine = best(group)
    return (
        row["median_s"] / mine["median_s"]
        if mine and row["median_s"] and not ours(row["implementation"])
        else None
    )


def _mebibytes(row: Row, group: Sequence[Row]) -> float | None:
    return row["peak_bytes"] / 2**20 if row["peak_bytes"] else None


def _over_forward(row: Row, group: Sequence[Row]) -> float | None:
    base = [r["median_s"] for r in group if r["implementation"] in ("forward", "network alone")]
    return row["median_s"] / base[0] if row["median_s"] and base and base[0] else None


#: Kind of figure: what its bars are, the label of the axis, and whether there is a line at 1.
BARS = {
    "speedup": (_over_ours, "time over fastgrad's: right of 1, fastgrad is faster", True),
    "memory": (_mebibytes, "peak memory of one call, MiB", False),
    "cost": (_over_forward, "time over that of a forward pass", True),
}


def _bars(cases: Sequence[Row], colours: dict[str, str], kind: str) -> Any:
    """Horizontal bars, a block for each case; None where there is nothing to draw."""
    value, label, line = BARS[kind]
    blocks: dict[str, list[tuple[str, float]]] = {}
    for case, group in sorted(grouped(cases).items(), key=lambda item: by_size(item[0])):
        found = [(r["implementation"], value(r, group)) for r in group]
        if bars := [(name, length) for name, length in found if length is not None]:
            blocks[case] = bars
    if not blocks:
        return None
    count = sum(map(len, blocks.values()))
    figure, (panel,) = _figure(9, 1.2 + 0.2 * count + 0.22 * len(blocks))
    place, ticks, seen = 0.0, [], set()
    for bars in blocks.values():
        ticks.append(place + (len(bars) - 1) / 2)
        for name, length in bars:
            panel.barh(place, length, color=colours[name], label=None if name in seen else name, height=0.9)
            panel.annotate(f" {length:.3g}", (length, place), va="center", fontsize=7)
            seen.add(name)
            place += 1
        place += 1.1
    panel.set_yticks(ticks, list(blocks), fontsize=7)
    # No more room above and below than between two blocks.
    panel.set(ylim=(place - 0.5, -1.1), xscale="log", xlabel=label)
    if line:
        panel.axvline(1.0, color="black", linewidth=0.8)
    panel.margins(x=0.12)
    panel.grid(True, axis="x", alpha=0.3)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    return figure
