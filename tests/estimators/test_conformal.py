import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastgrad.estimators.conformal import COMBINATIONS, OneSided, TwoSided, UpperTail


def conformal(calibration, score):
    return (1 + (calibration >= score).sum()) / (len(calibration) + 1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.integers(-5, 5))
def test_p_values_are_never_below_the_conformal_ones_in_the_body(values, quarter):
    """Ties included: p lies between the conformal p-value and one rank above it, where it is counted."""
    calibration = np.array(values, dtype=float)
    tail = UpperTail.fit(torch.tensor(calibration), 0.05)
    score = quarter + 0.25
    if score > float(tail.start):
        return
    p = float(tail(torch.tensor([score])).exp())
    exact = conformal(calibration, score)
    assert exact - 1e-12 <= p <= exact + 1 / (len(calibration) + 1) + 1e-12
    at = float(tail(torch.tensor([calibration[0]])).exp())
    if calibration[0] <= float(tail.start):
        assert at == pytest.approx(conformal(calibration, calibration[0]), rel=1e-12)


def test_tail_goes_on_falling_beyond_every_calibration_score():
    tail = UpperTail.fit(torch.linspace(0, 1, 200), 0.05)
    log_p = tail(torch.tensor([0.99, 1.0, 2.0, 10.0, 100.0]))
    assert (log_p.diff() < 0).all()
    assert torch.isfinite(log_p).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_p_values_of_new_clean_scores_are_uniform(seed):
    generator = torch.Generator().manual_seed(seed)
    calibration, new = torch.randn(2000, generator=generator), torch.randn(4000, generator=generator)
    p = OneSided.fit(calibration)(new).exp().numpy()
    # Two empirical distributions of 2,000 and 4,000: the two-sample bound at a probability of 1e-6, and one rank.
    bound = np.sqrt(-np.log(1e-6 / 2) / 2 * (1 / 2000 + 1 / 4000)) + 1 / 2001
    assert stats.kstest(p, "uniform").statistic < bound


def test_two_sided_flags_what_is_too_good():
    meaning = TwoSided.fit(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    low, middle, high = meaning(torch.tensor([-9.0, 0.0, 9.0]))
    assert low < -5
    assert high < -5
    assert middle > -0.2
    assert float(meaning(torch.linspace(-9, 9, 500)).max()) <= 0


def test_constant_calibration_scores_stay_usable():
    log_p = OneSided.fit(torch.full((50,), 3.0))(torch.tensor([2.0, 3.0, 4.0]))
    assert log_p[0] == 0
    assert log_p[1] == 0
    assert log_p[2] < log_p[1]


@pytest.mark.parametrize("name", sorted(COMBINATIONS))
def test_combinations_grow_with_every_part_and_stop_at_the_cap(name):
    combine = COMBINATIONS[name]
    weights = [1.0, 2.0]
    base = combine(torch.tensor([[-1.0, -1.0]]), 20.0, weights)
    assert (combine(torch.tensor([[-2.0, -1.0]]), 20.0, weights) > base).all()
    assert (combine(torch.tensor([[-1.0, -2.0]]), 20.0, weights) > base).all()
    assert torch.equal(
        combine(torch.tensor([[-99.0, -1.0]]), 20.0, weights),
        combine(torch.tensor([[-20.0, -1.0]]), 20.0, weights),
    )


def test_harmonic_is_the_weighted_harmonic_mean():
    p = torch.tensor([[0.1, 0.5]], dtype=torch.float64)
    value = COMBINATIONS["harmonic"](p.log(), 20.0, [1.0, 3.0])
    assert float(value) == pytest.approx(np.log((1 / 0.1 + 3 / 0.5) / 4), rel=1e-12)


def test_nan_scores_stay_nan():
    assert torch.isnan(OneSided.fit(torch.randn(20))(torch.tensor([float("nan")]))).all()
