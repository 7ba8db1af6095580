"""The demo's figure: score histograms above, example images with their scores below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastgrad.plots import COLOURS, score_histograms


def draw(path: Path, scores: dict[str, NDArray[np.float64]], images: dict[str, Tensor], threshold: float) -> None:
    """Write the figure.

    Args:
        path: of the PNG.
        scores: of the clean digits, and of the four challenging sets after them.
        images: of the same sets, ``(n, 1, 24, 24)``.
        threshold: the score above which 5 % of clean images lie.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Two columns, so that a phone shows readable text.
    figure = Figure(figsize=(6.4, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.5, 1.0), squeeze=False)[:, 0]
    top.suptitle("Uncertainty, -log p (right of the line: flagged)", fontsize=13)
    clean, *others = scores
    for axis, name in zip(top.subplots(2, 2, sharex=True).flat, others, strict=True):
        score_histograms({clean: scores[clean], name: scores[name]}, axes=axis)
        axis.axvline(threshold, color="black", linestyle="--", linewidth=1)

    bottom.suptitle("Images and their scores (orange: flagged)", fontsize=13)
    grid = bottom.subplots(2, len(scores))
    for column, (name, values) in enumerate(scores.items()):
        grid[0, column].set_title(name.replace(" ", "\n", 1), fontsize=11)
        for axis, image, score in zip(grid[:, column], images[name], values, strict=False):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            colour = COLOURS[1] if score > threshold else "black"
            axis.set_xlabel(f"{score:.1f}", fontsize=12, color=colour)
    figure.savefig(path, dpi=110)
