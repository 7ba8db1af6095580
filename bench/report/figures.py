"""Figures of the speed cases, drawn from the results alone, with text that a phone shows readably."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.speed import YARDSTICKS, best, grouped, ours
from bench.report.text import Row, sizes

#: Pixels of a figure's width at `DPI`, and points of its text: a phone shows 350 pixels.
WIDTH, DPI, TEXT = 600, 100, 12
OURS = ("#c1272d", "#e8703a", "#f0a04b", "#7d1128", "#f6cf8b")
OTHERS = (
    "#1f4e79", "#5b8db8", "#6a9a5b", "#8c6bb1", "#7f7f7f", "#b8a13a", "#3b9c9c", "#a05a7a", "#2f2f2f", "#a9c9e8",
    "#b5d6a7", "#c9b3dd", "#6b4a2b",
)  # fmt: skip
#: A name has one colour in all figures of speed, and in all of detection.
SPEED = (
    "training step", "forward", "forward and data gradients", "BackPACK BatchL2Grad", "Opacus ghost norms",
    "vmap(grad)", "per-sample loop", "Opacus hooks", "Opacus ghost clipping", "torch.softmax",
    "closed form, textbook", "closed form, torch.compile", "autograd loop",
)  # fmt: skip
DETECTION = (
    "softmax", "margin", "Mahalanobis", "GradTrust", "all with gradients, labelled", "pNormSoftmax", "ReAct", "RMD",
    "RAS", "LTS", "Catalyst", "MultiMahalanobis", "Mahalanobis++",
)  # fmt: skip
FORMS = ("fastgrad, default", "fastgrad, clean only", "fastgrad, second pass", "fastgrad, risk", "fastgrad, labelled")
KNOWN = dict(zip((*SPEED, *DETECTION, *FORMS), (*OTHERS, *OTHERS, *OURS), strict=True))


def draw(document: Row) -> Any:
    """Return the figure of a table's cases: the scaling of contrasts if it has them, else bars, or None."""
    scaling = [row for row in document["cases"] if row["case"].startswith("contrasts B=")]
    return _scaling(scaling) if scaling else _bars(document["cases"])


def figure(height: float, panels: int = 1) -> tuple[Any, Any]:
    """Return a figure ``height`` inches high, and its panels one below the other."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH / DPI, height), layout="constrained")
    return made, made.subplots(panels, 1, squeeze=False)[:, 0]


def stacked(blocks: Mapping[str, Sequence[tuple[str, float]]], colour: Mapping[str, str], form: str, label: str) -> Any:
    """Return a figure of one panel with a heading for each block, and its bars below: names and lengths."""
    made, (panel,) = figure(1.8 + sum(0.24 * len(bars) + 0.4 for bars in blocks.values()))
    panel.set_xlabel(label, fontsize=TEXT)
    place, seen, at = 0.0, set(), panel.get_yaxis_transform()
    # A white background, so that no line runs through a word.
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for head, bars in blocks.items():
        panel.text(0.01, place, head, transform=at, fontsize=TEXT, va="center", bbox=clear)
        for name, length in bars:
            place += 1
            panel.barh(place, length, color=colour[name], label=None if name in seen else name, height=0.9)
            offset = {"xytext": (5, 0), "textcoords": "offset points"}
            panel.annotate(f"{length:{form}}", (length, place), va="center", fontsize=TEXT - 1, bbox=clear, **offset)
            seen.add(name)
        place += 1.6
    panel.set(yticks=[], ylim=(place - 0.9, -0.8))
    panel.tick_params(labelsize=TEXT - 1)
    panel.margins(x=0.16)
    panel.grid(True, axis="x", alpha=0.3)
    if seen:
        made.legend(fontsize=TEXT - 1, loc="outside lower center", ncols=2)
    return made


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name, its own if it is known; fastgrad's stand out."""
    found = {name: KNOWN[name] for name in names if name in KNOWN}
    for mine, palette in ((True, OURS), (False, OTHERS)):
        new = [name for name in names if name not in KNOWN and ours(name) is mine]
        free = [colour for colour in palette if colour not in found.values()]
        found |= zip(new, itertools.cycle(free), strict=False)
    return found


def _scaling(rows: list[Row]) -> Any:
    """Plot the time of the contrasts against N at the B with the most cases, and against B at the N with the most."""
    rows = [r for r in rows if r["median_s"] and r["case"].split()[-1] == rows[0]["case"].split()[-1]]
    if len(cases := {r["case"] for r in rows}) < 3:
        return None
    names = list(dict.fromkeys(r["implementation"] for r in rows))
    colour = colours(names)
    made, panels = figure(8.4, 2)
    for panel, along, fixed in ((panels[0], "N", "B"), (panels[1], "B", "N")):
        value = statistics.mode(sorted(sizes(case)[fixed] for case in cases))
        for name in names:
            line = sorted(
                (sizes(r["case"])[along], r["median_s"]) for r in rows
                if r["implementation"] == name and sizes(r["case"])[fixed] == value
            )  # fmt: skip
            if line:
                width = 2.4 if ours(name) else 1.2
                panel.plot(*zip(*line, strict=True), "o-", color=colour[name], label=name, linewidth=width)
        panel.set(xscale="log", yscale="log")
        panel.set_xlabel({"N": "N (classes)", "B": "B (samples)"}[along], fontsize=TEXT)
        panel.set_ylabel("seconds", fontsize=TEXT)
        panel.set_title(f"all contrasts, {fixed} = {value}", fontsize=TEXT)
        panel.tick_params(labelsize=TEXT - 1)
        panel.grid(True, which="major", alpha=0.3)
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    made.legend(lines.values(), lines.keys(), fontsize=TEXT - 1, loc="outside lower center", ncols=2)
    return made


def _bars(cases: Sequence[Row]) -> Any:
    """Plot the time over fastgrad's: its own bar in each case, the baseline's and the fastest rivals'."""
    colour = colours(list(dict.fromkeys(r["implementation"] for r in cases)))
    blocks = {}
    for case, group in grouped(cases).items():
        mine = best(group)
        if mine is None:
            continue
        others = [r for r in group if r["median_s"] and r is not mine and not ours(r["implementation"])]
        # Rivals first, then implementations that do less than the task.
        others.sort(key=lambda r: (r["implementation"] in YARDSTICKS, r["median_s"]))
        base = [r for r in others if r["implementation"] == r["relative_to"]]
        shown = [mine, *base, *[r for r in others if r not in base][:2]]
        blocks[case] = [(r["implementation"], r["median_s"] / mine["median_s"]) for r in shown]
    if not blocks:
        return None
    made = stacked(blocks, colour, ".3g", "time over fastgrad's: above 1, fastgrad is faster")
    panel = made.axes[0]
    panel.set(xscale="log")
    least, most = panel.get_xlim()
    ticks = [t for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 5, 10, 20) if least <= t <= most]
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
    panel.set_xticks([], minor=True)
    panel.axvline(1.0, color="black", linewidth=0.8)
    return made
