"""Figures drawn from the results alone: values with their intervals by group, and times by size.

Every name stands beside its value, so that no reader depends on colours; a name has one colour in all figures.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.report.speed import YARDSTICKS, beside, best, grouped, ours, whole
from bench.report.text import Row, sizes

#: Pixels of a figure's width at `DPI`, and points of its text: a phone shows 350 pixels.
WIDTH, DPI, TEXT = 600, 100, 12
#: The colours of fastgrad's forms are warm, those of its rivals cold, and neighbours differ in lightness.
COLOURS = {
    "fastgrad": "#c1121f", "fastgrad, default": "#c1121f", "fastgrad, clean only": "#f4a100",
    "fastgrad, second pass": "#6d1a5b", "fastgrad, risk": "#f0529c", "fastgrad, labelled": "#a8651e",
    "correction": "#c1121f", "H, gated": "#f4a100", "selective": "#6d1a5b",
    "softmax": "#12355b", "softmax, temperature": "#3f8efc", "Mahalanobis": "#2a9d5c", "MultiMahalanobis": "#7ac74f",
    "RAS": "#1b998b", "Catalyst": "#7b6fd0", "GradTrust": "#7b6fd0", "pNormSoftmax": "#1b998b", "LTS": "#3f8efc",
    "NCI": "#3f8efc", "fDBD": "#7b6fd0", "all but gradients, labelled": "#2a9d5c", "AutoAttack": "#3f8efc",
    "batch norm adapted": "#2a9d5c", "last layer again": "#3f8efc",
    "training step": "#12355b", "vmap(grad)": "#2a9d5c", "per-sample loop": "#3f8efc", "torch.softmax": "#12355b",
    "closed form, textbook": "#3f8efc", "exact form, torch.compile": "#7ac74f", "torch.compile of fastgrad": "#f4a100",
    "closed form, torch.compile": "#1b998b", "autograd loop": "#7b6fd0",
    "BackPACK BatchL2Grad": "#7b6fd0", "Opacus ghost norms": "#1b998b", "Opacus hooks": "#7b6fd0",
    "TorchJD autogram": "#7b6fd0", "rows written, then linear": "#3f8efc",
}  # fmt: skip


class Value(NamedTuple):
    """A number with its interval, and the text to print beside it."""

    text: str
    value: float
    low: float
    high: float


#: The rows of a group: a name, and a value for each panel, or None.
Lines = Sequence[tuple[str, Sequence[Value | None]]]


def colour(name: str) -> str:
    """Return the colour of a name; fastgrad's unnamed forms share one, all others are grey."""
    return COLOURS.get(name, COLOURS["fastgrad"] if ours(name) else "#6c757d")


def draw(document: Row) -> Any:
    """Return the figure of a table's cases: the scaling of contrasts if it has them, else times, or None."""
    scaling = [row for row in document["cases"] if row["case"].startswith("contrasts B=")]
    return _scaling(scaling) if scaling else _times(document["cases"])


def figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure ``height`` inches high, and its panels, rows first."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH / DPI, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, sharey=columns > 1).ravel()


def dots(groups: Mapping[str, Lines], label: str, *, line: tuple[float, str], titles: Sequence[str]) -> Any:
    """Return a figure with a panel for each title: under each group's heading its values, as dots with intervals.

    ``line`` is a value to compare with, such as that of chance, and its name.
    """
    made, panels = figure(1.3 + sum(0.24 * len(lines) + 0.36 for lines in groups.values()), 1, len(titles))
    place, ticks, heads = 0.0, {}, {}
    for head, lines in groups.items():
        heads[head] = place
        for name, values in lines:
            place += 1
            ticks[place] = name
            for panel, found in zip(panels, values, strict=True):
                if found is None:
                    continue
                panel.plot([found.low, found.high], [place, place], color=colour(name), linewidth=2)
                panel.plot(found.value, place, "o", color=colour(name), markersize=7)
                at = panel.get_yaxis_transform()
                panel.text(0.99, place, found.text, transform=at, fontsize=TEXT - 2, ha="right", va="center")
        place += 1.5
    if len(titles) == 1:
        made.suptitle(textwrap.fill(titles[0], 66), fontsize=TEXT)  # over the whole width
    for panel, title in zip(panels, titles, strict=True):
        panel.axvline(line[0], color="black", linewidth=1, linestyle="--", zorder=0)
        panel.set(ylim=(place - 0.8, -0.8), facecolor="none")
        panel.set_title(title if len(titles) > 1 else "", fontsize=TEXT)
        panel.tick_params(labelsize=TEXT - 1, length=0)
        panel.grid(True, axis="x", alpha=0.3)
        panel.spines[["top", "right", "left"]].set_visible(False)
        least, most = panel.get_xlim()
        panel.set_xticks([tick for tick in panel.get_xticks() if least <= tick <= most])
        # Room for the text at the right edge.
        panel.set_xlim(least, most + (most - least) * 0.2 * len(titles))
    panels[0].set_yticks(list(ticks), list(ticks.values()))
    for head, at in heads.items():
        panels[0].annotate(
            head, (4, at), xycoords=("figure pixels", "data"), fontsize=TEXT, fontweight="bold", va="center",
            annotation_clip=False, in_layout=False, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    made.supxlabel(f"{label}\n(dashed: {line[1]})", fontsize=TEXT)
    return made


def _scaling(rows: list[Row]) -> Any:
    """Plot the time of the contrasts against N at the B with the most cases, and against B at the N with the most."""
    rows = [r for r in rows if r["median_s"] and r["case"].split()[-1] == rows[0]["case"].split()[-1]]
    if len(cases := {r["case"] for r in rows}) < 3:
        return None
    names = list(dict.fromkeys(r["implementation"] for r in rows))
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
                panel.plot(*zip(*line, strict=True), "o-", color=colour(name), label=name, linewidth=width)
        panel.set(xscale="log", yscale="log")
        panel.set_xlabel({"N": "N (classes)", "B": "B (samples)"}[along], fontsize=TEXT)
        panel.set_ylabel("seconds", fontsize=TEXT)
        panel.set_title(f"all contrasts, {fixed} = {value}", fontsize=TEXT)
        panel.tick_params(labelsize=TEXT - 1)
        panel.grid(True, which="major", alpha=0.3)
    shown = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    made.legend(shown.values(), shown.keys(), fontsize=TEXT - 1, loc="outside lower center", ncols=2)
    return made


def _times(cases: Sequence[Row]) -> Any:
    """Plot the time over fastgrad's: its own in each case, the baseline's and the fastest rivals'."""
    groups = {}
    for case, group in grouped(cases).items():
        mine = best(group)
        if mine is None:
            continue
        others = [r for r in group if r["median_s"] and whole(r) and r is not mine and not ours(r["implementation"])]
        # Rivals first, then implementations that do less than the task.
        others.sort(key=lambda r: (r["implementation"] in YARDSTICKS, r["median_s"]))
        base = [r for r in others if r["implementation"] == r["relative_to"]]
        shown = [mine, *base, *[r for r in others if r not in base][:2]]
        groups[case] = [(r["implementation"], [_over(r, beside(r, mine))]) for r in shown]
    if not groups:
        return None
    # Times that were merged from several machines have no percentiles.
    ends = ", 10th to 90th percentile" if any(row["p10_s"] for row in cases) else ""
    made = dots(groups, f"time over fastgrad's median{ends}", line=(1, "fastgrad"), titles=[""])
    panel = made.axes[0]
    found = [value for lines in groups.values() for _, (value,) in lines]
    least, most = min(value.low for value in found), max(value.high for value in found)
    panel.set(xscale="log", xlim=(least * 0.93, most * (most / least) ** 0.2))
    _plain_ticks(panel, (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100), most)
    return made


def _over(row: Row, base: float) -> Value:
    ends = (row[key] or row["median_s"] for key in ("p10_s", "p90_s"))
    return Value(f"{row['median_s'] / base:.3g}", row["median_s"] / base, *(end / base for end in ends))


def _plain_ticks(panel: Any, ticks: Iterable[float], most: float) -> None:
    """Set the ticks of a logarithmic axis up to ``most``, without powers of ten."""
    least = panel.get_xlim()[0]
    kept: list[float] = []
    for tick in ticks:
        # Labels would run into each other within a fourteenth of the axis.
        if least <= tick <= most and (not kept or tick >= kept[-1] * (most / least) ** (1 / 14)):
            kept.append(tick)
    panel.set_xticks(kept, [f"{tick:g}" for tick in kept])
    panel.set_xticks([], minor=True)
