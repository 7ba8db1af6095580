"""Figures draw what they are given, without a display and without touching pyplot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bad_arguments import refused
from sklearn.metrics import roc_auc_score

from fastgrad import metrics, plots


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def drawn(axes, tmp_path: Path) -> None:
    """The file is a picture of more than one colour."""
    from matplotlib import image

    path = tmp_path / "figure.png"
    plots.save(axes, path, dpi=60)
    assert image.imread(path).std() > 0.01
    assert axes.figure.canvas.manager is None, "pyplot shows only figures that have one"


def test_score_histograms_show_the_auroc(rng: np.random.Generator, tmp_path: Path) -> None:
    sets = {"clean": rng.normal(size=200), "noise": torch.tensor(rng.normal(2, 1, size=100))}
    axes = plots.score_histograms(sets)
    drawn(axes, tmp_path)
    texts = [t.get_text() for t in axes.get_legend().get_texts()]
    expected = roc_auc_score([0] * 200 + [1] * 100, np.concatenate(list(sets.values())))
    assert texts == ["clean", f"noise ({expected:.2f})"]
    for value in (1.0, 1e20):
        axes = plots.score_histograms({"same": np.nextafter(value, [value, 1e21])})
        outline = axes.patches[0].get_xy()
        assert np.ptp(outline[:, 0]) * outline[:, 1].max() == pytest.approx(40), "all in one of 40 bins"
    with pytest.raises(ValueError, match="reference"):
        plots.score_histograms(sets, reference="fog")
    with pytest.raises(ValueError, match="scores"):
        plots.score_histograms({})


def test_reliability_diagram_plots_the_bins(rng: np.random.Generator, tmp_path: Path) -> None:
    p = rng.dirichlet(np.full(4, 0.4), size=300)
    y = rng.integers(0, 4, size=300)
    axes = plots.reliability_diagram({"plain": p, "again": torch.tensor(p)}, y, bins=10)
    drawn(axes, tmp_path)
    found = metrics.reliability(p, y, bins=10)
    line = axes.lines[1]
    np.testing.assert_array_equal(line.get_xdata(), found.confidence[found.counts > 0])
    np.testing.assert_array_equal(line.get_ydata(), found.accuracy[found.counts > 0])


def test_contrast_sparsity_curves(tmp_path: Path) -> None:
    one = torch.zeros(4, 3, 50)
    one[..., 7] = 2.0
    axes = plots.contrast_sparsity({"dense": torch.ones(4, 3, 50), "sparse": one})
    drawn(axes, tmp_path)
    dense, sparse = axes.lines[:2]
    np.testing.assert_allclose(dense.get_ydata(), np.linspace(0, 1, 51), atol=1e-12)
    assert sparse.get_ydata()[1] == 1
    assert dense.get_label() == "dense (Gini 0.00)"
    assert sparse.get_label() == "sparse (Gini 0.98)"
    with pytest.raises(ValueError, match="not zero"):
        plots.contrast_sparsity({"zero": torch.zeros(2, 5)})


BAD = [
    (lambda: plots.score_histograms([1.0, 2.0]), "scores must map at least one name to an array"),
    (lambda: plots.score_histograms({"a": 3.0}), r"scores\['a'\] must have shape \(n,\), not empty; it was \(\)"),
    (lambda: plots.score_histograms({"a": [1.0, np.nan]}), r"scores\['a'\] must be finite"),
    (lambda: plots.score_histograms({"a": [1.0]}, reference=["a"]), "reference must be one of 'a'"),
    (
        lambda: plots.score_histograms({"a": [1.0]}, axes=np.array(["axes"])),
        "axes must be one of matplotlib's Axes",
    ),
    (lambda: plots.save("axes", "figure.png"), "axes must be one of matplotlib's Axes"),
    (lambda: plots.reliability_diagram(np.ones((3, 2)), [0, 0, 1]), "probabilities must map"),
    (lambda: plots.contrast_sparsity({"a": 1.0}), r"gradients\['a'\] must have shape \(..., E\)"),
    (lambda: plots.contrast_sparsity({"a": [[1.0, 2.0], [np.nan, 1.0]]}), r"gradients\['a'\] must be finite"),
]
test_bad_arguments = refused([(call, (TypeError, ValueError), words) for call, words in BAD])
