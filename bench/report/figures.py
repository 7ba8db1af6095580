"""Figures of the speed cases, at most 900 pixels wide, drawn from the results alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.report.document import Row
from bench.report.speed import best, grouped, ours
from bench.report.text import sizes

#: Pixels of a figure's width at `DPI`.
WIDTH, DPI = 900, 100
OURS = ("#c1272d", "#e8703a", "#f0a04b", "#7d1128", "#f6cf8b")
OTHERS = (
    "#1f4e79", "#5b8db8", "#6a9a5b", "#8c6bb1", "#7f7f7f", "#b8a13a", "#3b9c9c", "#a05a7a", "#2f2f2f", "#a9c9e8",
    "#b5d6a7", "#c9b3dd", "#6b4a2b",
)  # fmt: skip
#: One colour an implementation in all figures, in this order.
NAMES = (
    "training step", "forward", "forward and data gradients", "BackPACK BatchL2Grad", "Opacus ghost norms",
    "vmap(grad)", "per-sample loop", "Opacus hooks", "Opacus ghost clipping", "torch.softmax", "closed form, textbook",
    "closed form, torch.compile", "autograd loop",
)  # fmt: skip


def draw(cases: Sequence[Row]) -> Any:
    """Return what the cases of a table allow: the scaling of the contrasts, bars elsewhere, or None."""
    scaling = [row for row in cases if row["case"].startswith("contrasts B=")]
    return _scaling(scaling) if scaling else _bars(cases)


def figure(height: float, panels: int = 1) -> tuple[Any, Any]:
    """Return a figure of the usual width and its panels."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH / DPI, height), layout="constrained")
    return made, made.subplots(1, panels, squeeze=False)[0]


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each implementation, the same in every figure; fastgrad's stand out."""
    mine = [name for name in names if ours(name)]
    rest = [*NAMES, *(name for name in names if not ours(name) and name not in NAMES)]
    found = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}
    return found | {name: OURS[i % len(OURS)] for i, name in enumerate(mine)}


def _scaling(rows: list[Row]) -> Any:
    """Time of the contrasts against N at the batch with most N, and against B at the N with most B."""
    rows = [r for r in rows if r["median_s"] and r["case"].split()[-1] == rows[0]["case"].split()[-1]]
    if len({r["case"] for r in rows}) < 3:
        return None
    colour = colours(list(dict.fromkeys(r["implementation"] for r in rows)))
    made, panels = figure(4.2, 2)
    for panel, along, fixed in ((panels[0], "N", "B"), (panels[1], "B", "N")):
        values = [sizes(case)[fixed] for case in {r["case"] for r in rows}]
        value = max(sorted(set(values)), key=lambda v, values=values: (values.count(v), -v))  # type: ignore[misc]
        for name in dict.fromkeys(r["implementation"] for r in rows):
            line = sorted(
                (sizes(r["case"])[along], r["median_s"]) for r in rows
                if r["implementation"] == name and sizes(r["case"])[fixed] == value
            )  # fmt: skip
            if line:
                width = 2.4 if ours(name) else 1.2
                panel.plot(*zip(*line, strict=True), "o-", color=colour[name], label=name, linewidth=width)
        what = "classes" if along == "N" else "samples"
        panel.set(xscale="log", yscale="log", xlabel=f"{along} ({what})", ylabel="seconds")
        panel.set_title(f"all contrasts, {fixed} = {value}")
        panel.grid(True, which="major", alpha=0.3)
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    made.legend(lines.values(), lines.keys(), fontsize=7, loc="outside lower center", ncols=4)
    return made


def _bars(cases: Sequence[Row]) -> Any:
    """Time over fastgrad's, a block of bars for each case, fastgrad's own among them."""
    colour = colours(list(dict.fromkeys(r["implementation"] for r in cases)))
    blocks = {}
    for case, group in grouped(cases).items():
        mine = best(group)
        if mine is not None:
            blocks[case] = [
                (r["implementation"], r["median_s"] / mine["median_s"]) for r in group if r["median_s"]
            ]
    if not blocks:
        return None
    made, (panel,) = figure(1.2 + sum(0.15 * len(bars) + 0.16 for bars in blocks.values()))
    place, ticks, seen = 0.0, [], set()
    for bars in blocks.values():
        ticks.append(place + (len(bars) - 1) / 2)
        for name, length in bars:
            panel.barh(place, length, color=colour[name], label=None if name in seen else name, height=0.9)
            panel.annotate(f" {length:.3g}", (length, place), va="center", fontsize=6)
            seen.add(name)
            place += 1
        place += 1.1
    panel.set_yticks(ticks, list(blocks), fontsize=7)
    panel.set(
        ylim=(place - 0.5, -1.1), xscale="log", xlabel="time over fastgrad's: right of 1, fastgrad is faster"
    )
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.margins(x=0.12)
    panel.grid(True, axis="x", alpha=0.3)
    made.legend(fontsize=7, loc="outside lower center", ncols=3)
    return made
