"""Figures for scores, calibration and gradient features; matplotlib is imported where it is used.

Every plot draws on the given axes, or on a new figure, and returns the axes. No function uses the global state of
``pyplot``, so all work on servers and in threads.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from fastgrad import metrics
from fastgrad.checks import Array, extra, one_of, to_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Blue for clean data, then colours that also differ in greyscale (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: Style of legends.
_PLAIN: dict[str, Any] = {"frameon": False, "fontsize": 8}


def new_axes(width: float = 5.0, height: float = 3.4) -> Axes:
    """Return empty axes on a new figure of ``width`` x ``height`` inches, drawn without a display."""
    with extra("demo"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(axes: Axes, path: str | Path, *, dpi: int = 110) -> None:
    """Write the figure of ``axes``; the suffix of ``path`` chooses the format."""
    figure = _axes(axes).get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=dpi)


def _axes(axes: Axes | None, width: float = 5.0, height: float = 3.4) -> Axes:
    """Return the given axes, or new ones."""
    if axes is None:
        return new_axes(width, height)
    if not hasattr(axes, "get_figure"):
        raise TypeError(f"axes must be one of matplotlib's Axes, or None; it was {type(axes).__name__}")
    return axes


def _arrays(
    argument: str, given: Mapping[str, ArrayLike | Tensor], shape: str, dimensions: Container[int]
) -> dict[str, Array]:
    """Return the arrays by name, each not empty and of an allowed number of dimensions; errors name the ``shape``."""
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{argument} must map at least one name to an array; it was {repr(given)[:80]}")
    arrays = {name: to_array(f"{argument}[{name!r}]", values) for name, values in given.items()}
    for name, array in arrays.items():
        if array.ndim not in dimensions or not array.size:
            raise ValueError(f"{argument}[{name!r}] must have shape {shape}, not empty; it was {array.shape}")
    return arrays


def score_histograms(
    scores: Mapping[str, ArrayLike | Tensor], *, reference: str | None = None, axes: Axes | None = None
) -> Axes:
    """Draw histograms of the scores, with the AUROC against the reference in the legend.

    Args:
        scores: name to scores ``(n,)``; higher means less reliable.
        reference: the name that holds the clean scores; the first one if None.
        axes: where to draw; a new figure if None.

    Raises:
        ValueError: Scores are missing or not finite, or the reference is not among them.
    """
    arrays = _arrays("scores", scores, "(n,)", (1,))
    reference = next(iter(scores)) if reference is None else reference
    one_of("reference", reference, list(scores))
    from sklearn.metrics import roc_auc_score

    axes, clean = _axes(axes), arrays[reference]
    together = np.concatenate(list(arrays.values()))
    # The outermost half per cent at each end would squeeze everything else into a few bins.
    low, high = np.quantile(together, [0.005, 0.995])
    # Scores that differ only by rounding leave no room for bins.
    edges = np.linspace(low, high if high - low > 1e-12 * abs(low) else low + max(1, abs(low)), 41).tolist()
    for colour, (name, array) in zip(cycle(COLOURS), arrays.items(), strict=False):
        labels = np.repeat([0, 1], [len(clean), len(array)])
        found = "" if name == reference else f" ({roc_auc_score(labels, np.concatenate([clean, array])):.2f})"
        clipped = np.clip(array, edges[0], edges[-1])
        style = {"histtype": "stepfilled", "alpha": 0.35} if name == reference else {"histtype": "step"}
        axes.hist(clipped, edges, density=True, color=colour, label=name + found, lw=1.5, **style)
    axes.set(xlabel="uncertainty score", ylabel="density")
    columns = 1 + (len(scores) > 3)
    # Above the axes, where it covers no bar.
    axes.legend(ncols=columns, title="set (AUROC)", title_fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), **_PLAIN)
    return axes


def reliability_diagram(
    probabilities: Mapping[str, ArrayLike | Tensor],
    labels: ArrayLike | Tensor,
    *,
    bins: int = 15,
    axes: Axes | None = None,
) -> Axes:
    """Draw accuracy over confidence, one line per model; the area of a marker grows with the samples in its bin.

    Args:
        probabilities: name to ``(B, N)``.
        labels: ``(B,)`` class indices.
        bins: bins of equal width.
        axes: where to draw; a new figure if None.
    """
    arrays = _arrays("probabilities", probabilities, "(B, N)", (2,))
    axes = _axes(axes, 3.8, 3.6)
    axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--", label="perfect")
    for colour, (name, values) in zip(cycle(COLOURS), arrays.items(), strict=False):
        bars = metrics.reliability(values, labels, bins=bins)
        filled = bars.counts > 0
        confidence, accuracy = bars.confidence[filled], bars.accuracy[filled]
        axes.plot(confidence, accuracy, color=colour, lw=1.3, label=f"{name} (ECE {bars.ece:.3f})")
        area = 120 * bars.counts[filled] / bars.counts.sum()
        axes.scatter(confidence, accuracy, s=area + 4, color=colour)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="upper left", **_PLAIN)
    return axes


def contrast_sparsity(gradients: Mapping[str, ArrayLike | Tensor], *, axes: Axes | None = None) -> Axes:
    """Draw the share of contrast gradients' squared norm in their largest entries, over the share of entries.

    Args:
        gradients: name (such as "before training" and "after training") to gradients ``(..., E)``, for example
            contrast rows ``(B, N, D)``. Every vector of E entries is sorted by itself, and the curves are averaged.
        axes: where to draw; a new figure if None.

    The legend gives the Gini index of the squared entries: 0 if all are equal, near 1 if one carries all.
    """
    arrays = _arrays("gradients", gradients, "(..., E)", range(1, 65))
    axes = _axes(axes, 4.4, 3.4)
    for colour, (name, rows) in zip(cycle(COLOURS), arrays.items(), strict=False):
        energy = np.sort(rows.reshape(-1, rows.shape[-1]) ** 2, axis=1)[:, ::-1]
        energy = energy[energy.sum(1) > 0]
        if not len(energy):
            raise ValueError(f"gradients[{name!r}] must hold a vector that is not zero; all were")
        shares = np.cumsum(energy, 1) / energy.sum(1, keepdims=True)
        curve = np.concatenate([[0.0], shares.mean(0)])
        entries = np.linspace(0, 1, len(curve))
        gini = 2 * float(((curve[1:] + curve[:-1]) / 2).mean()) - 1
        axes.plot(entries, curve, color=colour, lw=1.5, label=f"{name} (Gini {gini:.2f})")
    axes.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--")
    axes.set(xlabel="share of the entries, largest first", ylabel="share of the squared norm", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="lower right", **_PLAIN)
    return axes
