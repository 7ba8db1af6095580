import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastgrad.scores.conformal import SMALL, STEEPEST, PValues, weighted

RATES = (0.01, 0.05, 0.1, 0.2)


def one_sided(calibration, **how):
    return PValues.fit(torch.as_tensor(calibration).unsqueeze(0), [False], **how)


def log_p_of(tail, scores):
    return tail(torch.as_tensor(scores, dtype=torch.float64).unsqueeze(0)).squeeze(0)


def width(calibration):
    ordered = np.sort(calibration)
    n = len(ordered)
    return (ordered[3 * n // 4] - ordered[n // 4] if n > 1 else 0) or ordered[-1] - ordered[0] or 1.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=60), st.integers(-20, 20), st.sampled_from([1.0, 1e-6]))
def test_body_is_the_lowest_allowed_map(values, quarter, unit):
    """Ties and near ties included."""
    calibration = np.array(values) * unit + (np.array(values) > 1)
    tail = one_sided(calibration)
    score = quarter / 4 * unit + (quarter / 4 > 1)
    if score > float(tail.start):
        return
    knots = tail.scores[0].numpy()
    assert set(knots) <= set(calibration)

    def raised(at):
        return max(
            np.log((calibration >= lower).sum() / (len(calibration) + 1)) - STEEPEST / width(calibration) * (at - lower)
            for lower in knots[knots <= at]
        )

    log_p = float(log_p_of(tail, [score]))
    below, above = knots[knots <= score], knots[knots >= score]
    highest = raised(below.max()) if len(below) else 0.0
    # 1e-16 of a score of 1 times the slope, up to 8e6.
    assert raised(above.min()) - 1e-8 <= log_p <= highest + 1e-8


@pytest.mark.parametrize("n", [50, 160, 1000])
def test_knots_are_counts_a_few_ranks_apart(n):
    calibration = np.random.default_rng(n).exponential(size=n)
    tail = one_sided(calibration)
    counts = np.array([(calibration >= knot).sum() for knot in tail.scores[0].numpy()])
    np.testing.assert_allclose(tail.log_p[0], np.log(counts / (n + 1)), rtol=1e-12)
    assert counts[0] == n
    assert counts[-1] == min(10, n // 10) + 1
    # A twentieth of all or a quarter of the scores above, rounded to whole ranks.
    steps, allowed = counts[:-1] - counts[1:], np.minimum(n / 20, (1 - np.exp(-0.25)) * counts[:-1])
    assert (steps <= allowed + 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_slope_is_limited_in_body_and_tail(seed):
    """What rounding moves a score by, it moves log p by at most STEEPEST times that, in units of the middle half."""
    generator = torch.Generator().manual_seed(seed)
    # Pairs that nearly tie, and a lump of thirty that do.
    calibration = torch.randn(60, generator=generator, dtype=torch.float64).repeat(2)
    calibration[60:] += 1e-9 * torch.rand(60, generator=generator, dtype=torch.float64)
    calibration = torch.cat([calibration, 3 + 1e-9 * torch.arange(30), 5 + 1e-9 * torch.arange(3)])
    tail = one_sided(calibration)
    grid = torch.cat([torch.linspace(-4, 9, 2001, dtype=torch.float64), calibration]).sort().values
    log_p = log_p_of(tail, grid)
    assert (log_p.diff() <= 0).all()
    # eps of log p's size beside the steps of 1e-9.
    assert (-log_p.diff() <= STEEPEST / width(calibration.numpy()) * grid.diff() * (1 + 1e-9) + 1e-13).all()
    assert log_p[-1] < log_p[-2] < log_p[-3]


def test_tail_goes_on_falling_beyond_every_calibration_score():
    log_p = log_p_of(one_sided(torch.linspace(0, 1, 200)), [0.99, 1.0, 2.0, 10.0, 100.0])
    assert (log_p.diff() < 0).all()
    assert torch.isfinite(log_p).all()


def test_tail_is_the_predictive_law_of_exponential_excesses():
    """``(1 + t / (k e))^-k`` is what a new excess does beside k seen ones: drawn and counted."""
    rng = np.random.default_rng(0)
    k, t = 5, 2.0
    seen, new = rng.exponential(size=(200_000, k)), rng.exponential(size=200_000)
    share = (new > t * seen.mean(1)).mean()
    expected = (1 + t / k) ** -k
    assert abs(share - expected) < 5 * np.sqrt(expected / 200_000)
    tail = one_sided([0.0])
    tail.scale, tail.count, tail.start_log_p, tail.log_p = (torch.full((1, 1), v) for v in (1.0, k, 0.0, 0.0))
    log_p = log_p_of(tail, [-1.0, t])
    assert log_p.exp().tolist() == pytest.approx([1, expected], rel=1e-12)


DISTRIBUTIONS = {
    "exponential": stats.expon(), "normal": stats.norm(), "gamma": stats.gamma(3), "heavy": stats.t(3),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [50, 160, 1000])
def test_flagged_share_is_the_stated_one_on_average(n, name):
    """Over calibration sets the flagged share follows a Beta law of mean a, its variance a (1 - a) / (n + 2)."""
    law, draws = DISTRIBUTIONS[name], 200
    rng = np.random.default_rng(n)
    # New scores without sampling error of their own: the law's quantiles.
    new = torch.tensor(law.isf((np.arange(4000) + 0.5) / 4000))
    shares = np.empty((draws, len(RATES)))
    for draw in range(draws):
        log_p = log_p_of(one_sided(law.rvs(n, random_state=rng)), new)
        shares[draw] = [(log_p < np.log(rate)).double().mean() for rate in RATES]
    for rate, share in zip(RATES, shares.T, strict=True):
        error = np.sqrt(rate * (1 - rate) / (n + 2) / draws)
        # Fewer than two scores lie beyond: the tail's shape decides, and only an exponential one is known.
        loss = 1.0 if rate * n < 2 and name != "exponential" else 0.06 * rate
        assert share.mean() < rate + 4 * error + (rate if loss == 1 else 0.03 * rate)
        assert share.mean() > rate - 4 * error - loss
        assert share.std() < 1.2 * np.sqrt(rate * (1 - rate) / (n + 2)) + 0.2 * rate


def test_bounded_scores_keep_their_power():
    """Scores that end abruptly: the slope's limit must not raise a p-value of 5 % to 20 %."""
    rng = np.random.default_rng(0)
    new = torch.linspace(0, 1, 4001, dtype=torch.float64)
    shares = [
        float((log_p_of(one_sided(rng.uniform(size=1000)), new) < np.log(0.05)).double().mean()) for _ in range(100)
    ]
    assert 0.04 < np.mean(shares) < 0.051


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_p_values_of_new_clean_scores_are_uniform(seed):
    generator = torch.Generator().manual_seed(seed)
    calibration, new = torch.randn(2000, generator=generator), torch.randn(4000, generator=generator)
    p = log_p_of(one_sided(calibration), new).exp().numpy()
    # Two empirical distributions of 2,000 and 4,000: the two-sample bound at a probability of 1e-6, and one rank.
    bound = np.sqrt(-np.log(1e-6 / 2) / 2 * (1 / 2000 + 1 / 4000)) + 1 / 2001
    assert stats.kstest(p, "uniform").statistic < bound


def test_two_sided_flags_what_is_too_good():
    meaning = PValues.fit(torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)), [True])
    low, middle, high = log_p_of(meaning, [-9.0, 0.0, 9.0])
    assert low < -5
    assert high < -5
    # Half of the scores lie above it.
    assert abs(middle - np.log(0.5 / (1 - SMALL))) < 0.1
    assert float(log_p_of(meaning, torch.linspace(-9, 9, 500)).max()) <= 0


def test_the_sides_of_a_score_share_its_false_alarms():
    generator = torch.Generator().manual_seed(0)
    calibration, new = torch.randn(20000, generator=generator), torch.randn(40000, generator=generator)
    flagged = log_p_of(PValues.fit(calibration.unsqueeze(0), [True]), new) < np.log(0.1)
    error = 4 * np.sqrt(0.1 * 0.9 * (1 / 20000 + 1 / 40000))
    assert abs(float(flagged.double().mean()) - 0.1) < error
    assert abs(float((flagged & (new < 0)).double().mean()) - SMALL * 0.1) < error / 4


def test_constant_calibration_scores_stay_usable():
    log_p = log_p_of(one_sided(torch.full((50,), 3.0)), [2.0, 3.0, 4.0])
    assert log_p[:2].exp().tolist() == pytest.approx([50 / 51, 50 / 51])
    assert log_p[2] < log_p[1]


def test_evidence_grows_up_to_the_cap():
    def total(*log_p):
        return float(weighted(torch.tensor([log_p]), 20.0, [1.0, 2.0]).sum())

    assert total(-1.0, -1.0) == 3
    assert total(-2.0, -1.0) == 4
    assert total(-1.0, -2.0) == 5
    assert total(-99.0, -1.0) == total(-20.0, -1.0) == 22


@pytest.mark.parametrize("count", [20, 50, 1000])
def test_counted_p_values_are_ranks(count):
    scores = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    ordered = scores.sort(descending=True).values
    tail = one_sided(scores, counted=True)
    ranks = torch.arange(1, count + 1)
    found = log_p_of(tail, ordered).exp() * (count + 1)
    # Where scores lie close together p is raised.
    assert 1 - 1e-9 <= found[0] < 2.5
    assert (found * (1 + 1e-9) >= ranks).all()
    assert (found.diff() > 0).all()
    assert log_p_of(tail, ordered[:1] + 1).exp() * (count + 1) < found[0]


def test_counted_p_values_promise_their_rate_whatever_the_scores():
    """A share of .15 lies apart from the others, so that a rank between two counted ones lies far from its place."""
    rng = np.random.default_rng(0)
    scores = np.where(rng.random(999) < 0.15, 100 + 0.1 * rng.random(999), rng.random(999))
    tail = one_sided(scores, counted=True)
    for k, score in enumerate(np.sort(scores)[::-1], 1):
        # Of 1,000 exchangeable scores one is above the k-th highest of the others with probability k / 1000.
        assert float(log_p_of(tail, [score]).exp()) >= k / 1000 - 1e-12


def test_nan_scores_stay_nan():
    for two_sided in (False, True):
        assert PValues.fit(torch.randn(1, 20), [two_sided])(torch.full((1, 3), torch.nan)).isnan().all()


def by_definition(tail: PValues, scores: np.ndarray) -> np.ndarray:
    """Interpolated between counted scores; from the last one on the tail."""
    knots, log_p = tail.scores[0].numpy(), tail.log_p[0].numpy()
    start, start_log_p, scale, count = (float(v) for v in (tail.start, tail.start_log_p, tail.scale, tail.count))
    beyond = start_log_p - count * np.log1p(np.maximum(scores - start, 0) / scale / count)
    return np.where(scores > start, beyond, np.interp(scores, knots, log_p))


@pytest.mark.parametrize("kinds", ["o", "t", "oo", "tt", "toto", "oot"])
def test_several_scores_together_mean_what_each_means(kinds: str) -> None:
    rng = np.random.default_rng(len(kinds))
    scale = 10.0 ** np.arange(len(kinds))[:, None]
    # Ties make tables of unequal lengths.
    calibration = rng.normal(size=(len(kinds), 200)) * scale
    calibration[0, 100:] = 0
    scores = rng.normal(size=(len(kinds), 500)) * 3 * scale
    found = PValues.fit(torch.tensor(calibration), [kind == "t" for kind in kinds])(torch.tensor(scores))
    for kind, row, seen, values in zip(kinds, found, calibration, scores, strict=True):
        expected = by_definition(one_sided(seen), values)
        if kind == "t":
            small = by_definition(one_sided(-seen), -values) - np.log(SMALL)
            expected = np.minimum(np.minimum(expected - np.log(1 - SMALL), small), 0)
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-12, atol=1e-12)
