"""The demo's figure: score histograms above, example images with their scores below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Scores = NDArray[np.float64]
_CLEAN, _CHALLENGE = "#3b6ea8", "#d1602f"


def draw(
    path: Path,
    clean: Scores,
    scores: dict[str, Scores],
    auroc: dict[str, float],
    images: dict[str, Tensor],
    threshold: float,
) -> None:
    """Write the figure.

    Args:
        path: of the PNG.
        clean: scores of the clean digits.
        scores: scores of each challenging set.
        auroc: of each challenging set against the clean digits.
        images: clean digits under ``"clean digits"``, and each challenging set; ``(n, 1, 24, 24)``.
        threshold: the score above which 5 % of clean images lie.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Two columns, so that a phone shows readable text.
    columns, examples = 2, 2
    figure = Figure(figsize=(6.4, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.5, 1.0), squeeze=False)[:, 0]
    top.suptitle("Uncertainty, -log p (right of the line: flagged)", fontsize=13)
    # A few scores are far out; they go into the last bin, so that the rest can be seen.
    largest = max(np.quantile(values, 0.99) for values in (clean, *scores.values()))
    edges = np.linspace(0, max(largest, 1.2 * threshold), 40)
    panels = top.subplots(-(-len(scores) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axis, (name, values) in zip(panels.flat, scores.items(), strict=False):
        for data, colour, label in ((clean, _CLEAN, "clean digits"), (values, _CHALLENGE, "challenging")):
            weights = np.full(len(data), 1 / len(data))
            axis.hist(
                np.minimum(data, edges[-1]), edges, weights=weights, color=colour, alpha=0.65, label=label
            )
        axis.axvline(threshold, color="black", linestyle="--", linewidth=1)
        axis.set_title(f"{name}\nAUROC {auroc[name]:.3f}", fontsize=12)
        axis.tick_params(labelsize=11)
    top.supylabel("share of images", fontsize=12)
    top.axes[0].legend(fontsize=11, loc="upper center")

    bottom.suptitle("Images and their scores (orange: flagged)", fontsize=13)
    rows = {"clean digits": clean, **scores}
    grid = bottom.subplots(examples, len(rows))
    for column, (name, values) in enumerate(rows.items()):
        for row in range(examples):
            axis = grid[row, column]
            axis.imshow(images[name][row, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            flagged = values[row] > threshold
            axis.set_xlabel(f"{values[row]:.1f}", fontsize=12, color=_CHALLENGE if flagged else "black")
            if row == 0:
                axis.set_title(name.replace(" ", "\n", 1), fontsize=11)
    figure.savefig(path, dpi=110)
