from __future__ import annotations

import itertools

import numpy as np
import pytest
from bad_arguments import refused

from fastgrad.deploy.drift import _BETS, _LOG_NORMALIZER, _PRIOR, DriftMonitor, ScoreReference


def binomial_upper(rate: float, trials: int, sigmas: float = 4.0) -> float:
    """A count that a binomial with this rate exceeds about once in 30,000 runs."""
    return trials * rate + sigmas * (trials * rate * (1 - rate)) ** 0.5 + 1


def test_every_bet_is_fair() -> None:
    # With p = sigmoid(v) the integrand is smooth and falls like exp(-0.1 |v|): the trapezoid rule is exact
    # here.
    v = np.linspace(-400, 400, 80_001)
    log_p, log_1p = -np.logaddexp(0, -v), -np.logaddexp(0, v)
    for (a, b), log_normalizer in zip(_BETS, _LOG_NORMALIZER, strict=True):
        integral = np.exp(log_normalizer + a * log_p + b * log_1p).sum() * (v[1] - v[0])
        assert integral == pytest.approx(1.0, abs=1e-9)
    assert _PRIOR.sum() == pytest.approx(1.0)
    assert (_PRIOR > 0).all()


def test_evidence_depends_on_ranks() -> None:
    """The evidence is a function of ranks: an increasing map of all scores changes nothing."""
    random = np.random.default_rng(3)
    calibration, stream = random.normal(size=400), random.normal(size=500)
    plain = DriftMonitor(ScoreReference.from_scores(calibration))
    mapped = DriftMonitor(ScoreReference.from_scores(calibration * 3 + 7))
    plain.update(stream)
    mapped.update(stream * 3 + 7)
    assert mapped.evidence == pytest.approx(plain.evidence, rel=1e-9)


@pytest.mark.parametrize("distribution", ["normal", "exponential", "discrete"])
def test_false_alarm_rate(distribution: str) -> None:
    random = np.random.default_rng(11)
    draw = {
        "normal": lambda n: random.normal(size=n),
        "exponential": lambda n: random.exponential(size=n) ** 3,
        "discrete": lambda n: random.integers(0, 5, size=n).astype(float),
    }[distribution]
    alpha, streams = 0.2, 120
    alarms = sum(DriftMonitor(draw(100), false_alarm_rate=alpha, seed=i).update(draw(400)) for i in range(streams))
    assert alarms <= binomial_upper(alpha, streams)


def test_average_run_length_form() -> None:
    random = np.random.default_rng(5)
    rate, lengths = 0.02, []
    for i in range(60):
        monitor = DriftMonitor(random.normal(size=200), false_alarm_rate=rate, form="average", seed=i)
        monitor.update(random.normal(size=400))
        lengths.append(monitor.alarm_at or 400)
    # Run lengths are censored at 400, so the true mean is at least the measured one; its error is at most
    # 400/sqrt(60).
    assert np.mean(lengths) + 4 * np.std(lengths) / 60**0.5 >= 1 / rate


@pytest.mark.parametrize(
    ("name", "shift", "longest"),
    [
        ("strong rise", lambda x: x + 4, 15),
        ("slight rise", lambda x: x + 0.5, 400),
        ("fall", lambda x: x - 1.5, 100),
        ("both tails", lambda x: 3 * x, 150),
        ("frozen camera", lambda x: 0 * x + 0.1, 300),
    ],
)
@pytest.mark.parametrize("before", [0, 500])
def test_shifts_are_found(name: str, shift, longest: int, before: int) -> None:
    random = np.random.default_rng(len(name))
    monitor = DriftMonitor(random.normal(size=1000), false_alarm_rate=0.01)
    assert not monitor.update(random.normal(size=before))
    assert monitor.update(shift(random.normal(size=longest)))
    assert before < monitor.alarm_at <= before + longest
    assert monitor.p_value <= 0.01


@pytest.mark.parametrize("form", ["ever", "average"])
def test_p_value_without_drift(form: str) -> None:
    random = np.random.default_rng(0)
    monitors = [DriftMonitor(random.normal(size=100), form=form, seed=i) for i in range(60)]
    for monitor in monitors:
        assert monitor.p_value == 1
        monitor.update(random.normal(size=300))
    # Of 60 at most 6 on average; 14 with a probability below one in a thousand.
    assert sum(monitor.p_value <= 0.1 for monitor in monitors) < 14


def test_one_by_one_and_reset() -> None:
    random = np.random.default_rng(0)
    calibration, stream = random.normal(size=100), random.normal(size=60) + 0.4
    whole, single = DriftMonitor(calibration, seed=4), DriftMonitor(calibration, seed=4)
    whole.update(stream)
    for score in stream:
        single.update(float(score))
    assert single.state() == whole.state()
    first = whole.state()
    whole.reset()
    assert whole.count == 0
    assert not whole.alarm
    whole.update(stream)
    assert whole.state() == first


def test_alarm_and_summary_until_reset() -> None:
    monitor = DriftMonitor(np.arange(100.0))
    assert monitor.summary().startswith("No drift was shown in 0 inputs, compared with 50 clean ones;")
    monitor.update(np.full(40, 1e6))
    assert (monitor.alarm, monitor.count) == (True, 40)
    assert f"shown at input {monitor.alarm_at} of 40 inputs" in monitor.summary()
    assert "ever raising this alarm without drift is at most 0.01" in monitor.summary()
    monitor.reset()
    assert (monitor.alarm, monitor.count, monitor.evidence) == (False, 0, 1.0)
    slow = DriftMonitor(ScoreReference([0, 1], [9, 9, 9]), false_alarm_rate=0.02, form="average")
    assert (slow.evidence, slow.p_value, slow.update([0.5])) == (0, 1, False)
    assert "once in 50 inputs or later on average" in slow.summary()


def test_huge_evidence() -> None:
    monitor = DriftMonitor(np.arange(100.0))
    monitor.update(np.full(3000, 1e6))
    at = monitor.alarm_at
    assert np.isfinite(monitor.evidence)
    monitor.update(np.random.default_rng(0).uniform(0, 100, size=100))
    assert monitor.alarm
    assert monitor.alarm_at == at


def test_constant_calibration_scores() -> None:
    monitor = DriftMonitor(np.zeros(50))
    assert not monitor.update(np.zeros(200))


def test_reference_counts() -> None:
    for size, bins in itertools.product((20, 21, 1000), (2, 64, 5000)):
        reference = ScoreReference.from_scores(np.random.default_rng(1).normal(size=size), bins=bins)
        assert reference.counts.sum() == size - size // 2
        assert len(reference.counts) == len(reference.edges) + 1 <= max(2, min(bins, size // 2))


BAD = [
    (lambda: DriftMonitor(np.zeros(5)), "at least 20"),
    (lambda: DriftMonitor(np.full(30, np.nan)), "finite"),
    (lambda: DriftMonitor(np.zeros((30, 2))), "one-dimensional"),
    (lambda: DriftMonitor(1j * np.ones(30)), "scores must be numeric; .* Complex"),
    (lambda: ScoreReference.from_scores(np.zeros(30), bins=2.5), "bins must be an integer"),
    (lambda: DriftMonitor(np.zeros(30), false_alarm_rate=0.0), r"false_alarm_rate must lie in \(0, 1\)"),
    (lambda: DriftMonitor(np.zeros(30), form="sometimes"), "form must be one of"),
    (lambda: ScoreReference(np.array([1.0, 1.0]), np.zeros(3)), "increasing"),
    (lambda: ScoreReference(np.zeros((1, 1)), np.zeros(2)), "increasing in one dimension"),
    (lambda: ScoreReference(np.array([1.0]), np.zeros(3)), "counts must be 2"),
    (lambda: ScoreReference(np.array([1.0]), [0, 0]), "counts must be .* not all zero"),
    (lambda: ScoreReference(np.array([1.0]), [1, -1]), "counts must be 2 non-negative numbers"),
    (lambda: DriftMonitor(np.zeros(30)).update([0.0, np.inf]), "in 1 rows, as in row 1"),
    (lambda: ScoreReference([0.0, 1j], np.zeros(3)), "edges must be numeric"),
    (lambda: ScoreReference([0.0, 1.0], ["a", "b", "c"]), "counts must be numeric"),
    (lambda: ScoreReference.from_scores(np.zeros(30), seed="a"), "seed must be an integer"),
    (lambda: DriftMonitor(np.zeros(30), seed=-1), "seed must be an integer"),
    (lambda: DriftMonitor(np.zeros(30), form=np.zeros(2)), "form must be one of"),
]
test_bad_arguments = refused([(call, ValueError, words) for call, words in BAD])
