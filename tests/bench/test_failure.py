"""Errors, risk and their figures."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("pytorch_ood")

from sklearn.metrics import roc_auc_score

from bench.detection import failure, resampled


def test_auroc_of_errors_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores, wrong = rng.random(60).round(1), (rng.random(60) < 0.4).astype(float)
    values = resampled.grouped_auroc(scores, wrong, np.arange(60))
    assert values[0] == pytest.approx(roc_auc_score(wrong, scores))
    # Six copies of ten images vary more than sixty images.
    grouped = resampled.grouped_auroc(np.tile(scores[:10], 6), np.tile(wrong[:10], 6), np.tile(np.arange(10), 6))
    assert np.nanstd(grouped[1:]) > values[1:].std()


def test_figures_of_a_perfect_and_of_a_constant_risk() -> None:
    wrong = np.repeat([0.0, 1.0], 20)
    found = failure.Judged(wrong, np.arange(40))
    perfect = failure.row(np.clip(wrong, 1e-6, 1 - 1e-6), found, probability=True)
    assert perfect["auroc"] == 1
    assert perfect["ece"] == pytest.approx(0, abs=1e-4)
    assert perfect["log loss"] == pytest.approx(0, abs=1e-4)
    same = failure.row(np.full(40, 0.5), found, probability=True)
    assert same["auroc"] == 0.5
    assert same["log loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert same["ece"] == 0
    assert "ece" not in failure.row(wrong, found, probability=False)
