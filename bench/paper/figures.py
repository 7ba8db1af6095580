"""Figures of the tables that the package itself does not need: matrices and grouped bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fastgrad.plots import COLOURS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heatmap(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str = "AUROC",
    limits: tuple[float, float] = (0.5, 1.0),
    axes: Axes | None = None,
) -> Axes:
    """A matrix of numbers in [0, 1] with every entry written into its cell, in hundredths.

    Args:
        values: ``(len(rows), len(columns))``; NaN cells stay empty.
        rows: names of the rows.
        columns: names of the columns.
        label: what the colours mean.
        limits: values at the ends of the colour scale.
        axes: where to draw; a new figure if None.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.shape != (len(rows), len(columns)):
        raise ValueError(f"values must have shape ({len(rows)}, {len(columns)}); it was {matrix.shape}")
    axes = axes or new_axes(1.9 + 0.36 * len(columns), 1.5 + 0.26 * len(rows))
    image = axes.imshow(matrix, cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto")
    middle = (limits[0] + limits[1]) / 2
    for (r, c), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            ink = "black" if value > middle else "white"
            axes.text(c, r, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=ink)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=axes, label=label)
    return axes


def grouped_bars(
    values: Mapping[str, Sequence[float]],
    groups: Sequence[str],
    *,
    errors: Mapping[str, Sequence[float]] | None = None,
    label: str = "AUROC",
    floor: float = 0.0,
    axes: Axes | None = None,
) -> Axes:
    """Bars side by side: one group per case, one colour per method.

    Args:
        values: method to one number per group.
        groups: names of the groups.
        errors: method to one half-width of an error bar per group.
        label: of the vertical axis.
        floor: where the vertical axis starts.
        axes: where to draw; a new figure if None.
    """
    for name, numbers in values.items():
        if len(numbers) != len(groups):
            raise ValueError(f"values[{name!r}] must have {len(groups)} numbers; it had {len(numbers)}")
    axes = axes or new_axes(max(5.0, 1.6 + 0.13 * len(groups) * len(values)), 3.4)
    width = 0.84 / max(1, len(values))
    places = np.arange(len(groups))
    for i, (name, numbers) in enumerate(values.items()):
        bars = errors.get(name) if errors else None
        offset = (i - (len(values) - 1) / 2) * width
        colour = COLOURS[i % len(COLOURS)] if len(values) <= len(COLOURS) else None
        axes.bar(places + offset, numbers, width, yerr=bars, color=colour, label=name, error_kw={"lw": 0.7})
    axes.set_xticks(
        places, groups, rotation=30 if len(groups) > 4 else 0, ha="right" if len(groups) > 4 else "center"
    )
    axes.set(ylabel=label, ylim=(floor, 1.0))
    axes.tick_params(labelsize=8)
    axes.legend(
        frameon=False, fontsize=7, ncols=min(4, len(values)), loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    return axes


def detection_bars(
    rows: Sequence[Mapping[str, Any]], groups: Sequence[tuple[str, str]], methods: Sequence[str]
) -> Axes:
    """AUROC of the methods on pairs of network and case, with the spread over seeds."""
    value = {(row["network"], row["case"], row["method"]): row for row in rows}
    auroc, spread = (
        {method: [value[network, case, method][key] for network, case in groups] for method in methods}
        for key in ("auroc", "spread")
    )
    return grouped_bars(auroc, [f"{case}\n{network}" for network, case in groups], errors=spread)


#: Methods of about one price that are named in a figure of quality against price.
NAMED = 6


def price_front(
    points: Mapping[str, tuple[float, float]], *, own: Sequence[str] = (), label: str = "mean AUROC"
) -> Axes:
    """Quality against price, each method a point, and the front of those that nothing cheaper betters.

    Args:
        points: method to its price in forward passes, drawn on a logarithmic scale, and its quality.
        own: methods that are drawn in another colour.
        label: of the vertical axis.
    """
    axes = new_axes(7.6, 5.2)
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    ends = max(price for price, _ in points.values()) * 1.1
    steps = [*(points[name] for name in front), (ends, points[front[-1]][1])]
    axes.step(*zip(*steps, strict=True), where="post", color="#999999", lw=1, label="best at the price")
    for name, (price, quality) in points.items():
        axes.scatter(price, quality, s=18, color=COLOURS[1] if name in own else COLOURS[0], zorder=3)
    # Names of crowded points stand below each other; of many, the best are named, the rest are in the table.
    qualities = [quality for _, quality in points.values()]
    apart = 0.03 * max(max(qualities) - min(qualities), 1e-9)
    columns: dict[tuple[bool, int], list[str]] = {}
    for name in sorted(points, key=lambda name: -points[name][1]):
        columns.setdefault((name in own, round(float(np.log2(points[name][0])))), []).append(name)
    raised = 0
    for (mine, _), names in columns.items():
        right = max(points[name][0] for name in names)
        shown = names if len(names) <= NAMED else names[: NAMED - 1]
        # Of the own ones each column stands above the one before.
        raised += len(names) if mine else 0
        height = points[names[0]][1] + (apart * raised if mine else 0)
        for name in shown:
            rest = len(names) - len(shown) if name == shown[-1] else 0
            height = height if mine else min(points[name][1], height)
            axes.annotate(
                f"{name}\nand {rest} below" if rest else name,
                points[name],
                (right * 1.08, height),
                fontsize=7,
                va="top" if rest else "center",
                color=COLOURS[1] if mine else "black",
                arrowprops={"arrowstyle": "-", "lw": 0.3, "color": "#bbbbbb"},
            )
            height -= apart
    axes.set_xscale("log", base=2)
    axes.set_xlim(right=ends * 1.4)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="forward passes", ylabel=label)
    axes.legend(frameon=False, fontsize=7, loc="lower center")
    return axes
