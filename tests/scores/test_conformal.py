import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastgrad.scores.conformal import COMBINATIONS, STEEPEST, OneSided, TwoSided, UpperTail


def conformal(calibration, score):
    return (1 + (calibration >= score).sum()) / (len(calibration) + 1)


def width(calibration):
    ordered = np.sort(calibration)
    n = len(ordered)
    return (ordered[3 * n // 4] - ordered[n // 4] if n > 1 else 0) or ordered[-1] - ordered[0] or 1.0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.integers(-20, 20), st.sampled_from([1.0, 1e-6])
)
def test_p_values_are_the_lowest_above_the_conformal_ones_that_fall_no_faster_than_allowed(
    values, quarter, unit
):
    """Ties and near ties included; in the body, where p is counted."""
    calibration = np.array(values) * unit + (np.array(values) > 1)
    tail = UpperTail.fit(torch.tensor(calibration), 0.05)
    score = quarter / 4 * unit + (quarter / 4 > 1)
    if score > float(tail.start):
        return

    def raised(at):
        return max(
            np.log(conformal(calibration, lower)) - STEEPEST / width(calibration) * (at - lower)
            for lower in calibration[calibration <= at]
        )

    log_p = float(tail(torch.tensor([score], dtype=torch.float64)))
    assert log_p >= np.log(conformal(calibration, score)) - 1e-12
    below, above = calibration[calibration <= score], calibration[calibration >= score]
    highest = raised(below.max()) if len(below) else 0.0
    # 1e-16 of a score of 1 times the slope, up to 4e6.
    assert raised(above.min()) - 1e-9 <= log_p <= highest + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_slope_is_limited_in_body_and_tail(seed):
    """What rounding moves a score by, it moves log p by at most STEEPEST times that, in units of the middle half."""
    generator = torch.Generator().manual_seed(seed)
    # Pairs that nearly tie, and a tail of three that do.
    calibration = torch.randn(60, generator=generator, dtype=torch.float64).repeat(2)
    calibration[60:] += 1e-9 * torch.rand(60, generator=generator, dtype=torch.float64)
    calibration = torch.cat([calibration, 5 + 1e-9 * torch.arange(3)])
    tail = UpperTail.fit(calibration, 0.02)
    grid = torch.cat([torch.linspace(-4, 9, 2001, dtype=torch.float64), calibration]).sort().values
    log_p = tail(grid)
    assert (log_p.diff() <= 0).all()
    # eps of log p's size beside the steps of 1e-9.
    assert (-log_p.diff() <= STEEPEST / width(calibration.numpy()) * grid.diff() * (1 + 1e-9) + 1e-13).all()
    assert log_p[-1] < log_p[-2] < log_p[-3]


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
