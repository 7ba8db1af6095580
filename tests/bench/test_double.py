"""DS-F1 and DS-AURC, against a loop over every pair of thresholds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench.detection.double import ds_aurc, ds_f1


def _case(seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, 40) / 9, rng.integers(0, 9, 40) / 9, rng.random(40) < 0.7, rng.random(40) < 0.6


@pytest.mark.parametrize("seed", range(3))
def test_ds_f1_is_the_best_of_all_pairs(seed: int) -> None:
    error, foreign, right, known = _case(seed)
    best = 0.0
    for a, b in itertools.product(error, foreign):
        taken = (error <= a) & (foreign <= b)
        good = (taken & known & right).sum()
        if good:
            precision, recall = good / taken.sum(), good / known.sum()
            best = max(best, 2 * precision * recall / (precision + recall))
    assert ds_f1(error, foreign, right, known) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ds_aurc_is_the_area_under_the_least_risk(seed: int) -> None:
    error, foreign, right, known = _case(seed)
    points = []
    for a, b in itertools.product(error, foreign):
        taken = (error <= a) & (foreign <= b)
        if taken.any():
            points.append(((taken & known).sum() / known.sum(), 1 - (taken & known & right).sum() / taken.sum()))
    heights = []
    for place in range(100):
        # The next bin that has a point, the last one with full coverage.
        inside = [(min(int(c * 100), 99), risk) for c, risk in points]
        later = [at for at, _ in inside if at >= place]
        heights.append(min(risk for at, risk in inside if at == min(later)) if later else 1.0)
    area = sum((one + other) / 2 for one, other in itertools.pairwise(heights)) / 100
    assert ds_aurc(error, foreign, right, known) == pytest.approx(area, rel=1e-12)


def test_perfect_scores_and_a_perfect_network_have_no_risk() -> None:
    known = np.arange(20) < 10
    assert ds_f1(np.zeros(20), ~known, known, known) == 1
    assert ds_aurc(np.zeros(20), ~known, known, known) == 0
