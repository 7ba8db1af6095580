"""Figures for scores, calibration and gradient features; matplotlib is imported where it is used.

Every plot draws on the given axes, or on a new figure, and returns the axes. No function uses the global state of
``pyplot``, so all work on servers and in threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastgrad import metrics
from fastgrad.checks import Array, at_least, extra, is_a, is_number, is_tensor, one_of, shape_is, to_array

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
    argument: str, given: Mapping[str, ArrayLike | Tensor], shape: str, dimensions: Container[int], finite: bool = True
) -> dict[str, Array]:
    """Return the arrays by name, each not empty and of an allowed number of dimensions; errors name the ``shape``."""
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{argument} must map at least one name to an array; it was {repr(given)[:80]}")
    arrays = {name: to_array(f"{argument}[{name!r}]", values, finite=finite) for name, values in given.items()}
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


def layer_norms(sqnorms: Mapping[str, ArrayLike | Tensor], names: Sequence[str], *, axes: Axes | None = None) -> Axes:
    """Draw the squared L2 norms of every parameter's gradient: the median, and a band from the 10th to 90th percentile.

    Args:
        sqnorms: name of a set of samples to squared norms ``(B, P)``.
        names: the P parameter names, in the order of the columns.
        axes: where to draw; a new figure if None.

    Raises:
        TypeError, ValueError: ``names`` is no collection, or a matrix does not have one column per name.
    """
    arrays = _arrays("sqnorms", sqnorms, "(B, P)", (2,), finite=False)
    axes = _axes(axes, 5.0, 4.8)
    is_a(Collection, names=names)
    names = list(names)
    positions = np.arange(len(names))
    # At most 16 names are written, so that they stay readable.
    step = -(-len(names) // 16)
    for colour, (name, matrix) in zip(cycle(COLOURS), arrays.items(), strict=False):
        shape_is(f"sqnorms[{name!r}]", matrix, (len(matrix), len(names)), "a column per name")
        low, middle, high = np.quantile(matrix, [0.1, 0.5, 0.9], axis=0)
        axes.plot(positions, middle, color=colour, lw=1.4, marker="o", ms=3, label=name)
        axes.fill_between(positions, low, high, color=colour, alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.set(ylabel="squared norm of the gradient", title="squared norms by parameter")
    axes.set_xticks(positions[::step], names[::step], rotation=90, fontsize=9)
    axes.margins(x=0.01)
    axes.legend(**_PLAIN)
    return axes


def manifold(
    score: Callable[[Tensor], ArrayLike | Tensor],
    points: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.6,
    resolution: int = 120,
    title: str = "",
    axes: Axes | None = None,
) -> Axes:
    """Draw the toy manifold figure: the score of a 2-D classifier's inputs as a map over the plane.

    Args:
        score: maps points ``(n, 2)`` to uncertainty ``(n,)``.
        points: training points ``(n, 2)``, drawn on the map.
        labels: their classes ``(n,)``.
        margin: how far the map extends beyond the points, as a multiple of their range along each axis.
        resolution: points of the map along each axis.
        title: written above the map.
        axes: where to draw; a new figure if None.

    Raises:
        TypeError, ValueError: Points are not finite or not two-dimensional, there is not one label and one score per
            point, or the margin or resolution is not a number.
    """
    is_a(Callable, score=score)  # type: ignore[arg-type]
    is_tensor("points", points)
    is_tensor("labels", labels)
    if points.dim() != 2 or points.shape[1] != 2 or not len(points) or not points.isfinite().all():
        raise ValueError(f"points must be finite, of shape (n, 2), not empty; its shape was {tuple(points.shape)}")
    shape_is("labels", labels, (len(points),), "one a point")
    is_number(margin=margin)
    at_least(2, resolution=resolution)
    axes = _axes(axes, 4.4, 3.6)
    low, high = points.amin(0), points.amax(0)
    # Points on a horizontal or vertical line have no range across it.
    reach = margin * torch.where(high > low, high - low, 1)
    xs, ys = (
        torch.linspace(float(low[i] - reach[i]), float(high[i] + reach[i]), resolution, device="cpu") for i in range(2)
    )
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).view(-1, 2).to(points)
    values = to_array("score", score(grid), finite=False)
    if values.shape != (len(grid),):
        raise ValueError(f"score must give one number a point, shape ({len(grid)},); it gave {values.shape}")
    values = values.reshape(resolution, resolution)
    image = axes.pcolormesh(xs.numpy(), ys.numpy(), values, cmap="viridis", shading="nearest", rasterized=True)
    axes.figure.colorbar(image, ax=axes, label="uncertainty")
    for colour, label in zip(cycle(("white", "#E69F00", "#CC79A7", "#56B4E9")), torch.unique(labels), strict=False):
        inside = to_array("points", points[labels == label])
        axes.scatter(inside[:, 0], inside[:, 1], s=7, color=colour, edgecolors="black", linewidths=0.3)
    axes.set(title=title, xticks=[], yticks=[])
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
