"""The estimated error rate of a stream, in a world in which everything is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bad_arguments import refused

from fastgrad.deploy.drift import DriftMonitor
from fastgrad.deploy.error_rate import LEAST, error_rate

EXCESS, CLEAN, LIMIT = 0.06, 200_000, 0.176


def world(
    count: int, unusual: float, seed: int = 0, confidence: float = 0.9, misled: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Risk, uncertainty and errors of a stream; the risk of clean inputs is too high by EXCESS on average.

    It is too low by as much on unusual inputs, which mislead the network with a probability of ``misled``. A tenth of
    the clean inputs and all others have a risk above LIMIT.
    """
    rng = np.random.default_rng(seed)
    strange = rng.random(count) < unusual
    uncertainty = np.where(strange, 5 + rng.exponential(size=count), rng.exponential(size=count))
    wrong = rng.random(count) < np.where(strange, misled, 1 - confidence)
    noise = rng.uniform(-0.02, 0.02, count)
    risk = np.where(strange, misled - EXCESS, 1 - confidence + EXCESS) + noise
    return risk, uncertainty, wrong


@pytest.mark.parametrize("unusual", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("misled", [0.3, 0.9])
def test_known_world(unusual: float, misled: float) -> None:
    count = 200_000
    risk, uncertainty, wrong = world(count, unusual, misled=misled)
    found = error_rate(risk, uncertainty, LIMIT, CLEAN)
    # The mean of n numbers below 1 is off by some n^(-1/2), and so is twice the share of unusual inputs.
    assert found.rate == pytest.approx(0.1 * (1 - unusual) + unusual, abs=5 / math.sqrt(count))
    if not unusual:
        assert found.rate == pytest.approx(wrong.mean(), abs=5 / math.sqrt(count))
    assert found.low <= found.rate <= found.high
    # The least of what the risk says comes true, or all answers to unusual inputs are wrong.
    least = LEAST * ((0.1 + EXCESS) * (1 - unusual) + (misled - EXCESS) * unusual)
    every = (0.1 + EXCESS) * (1 - unusual) + unusual
    assert (found.low, found.high) == pytest.approx((least, every), abs=10 / math.sqrt(count))


def test_rate_is_right_where_the_risk_tells_wrong_from_right() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random(1000) < 0.3
    risk = rng.uniform(0, 0.5, 1000) + 0.5 * wrong
    assert error_rate(risk, rng.exponential(size=1000), 0.5, 100).rate == wrong.mean()


@pytest.mark.parametrize("unusual", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("misled", "believed"), [(0.3, 0.3 / LEAST), (0.5, 0.1), (1.0, 0.1), (1.0, 0.9)])
def test_interval_holds_where_the_risk_is_wrong(unusual: float, misled: float, believed: float) -> None:
    """Also at the least share of the unusual inputs' risk, ``believed``, and where all of their answers are wrong."""
    inside = []
    for seed in range(200):
        risk, uncertainty, wrong = world(400, unusual, seed, misled=misled)
        found = error_rate(np.where(uncertainty > 5, believed, risk), uncertainty, LIMIT, CLEAN, confidence=0.9)
        inside.append(found.low <= wrong.mean() <= found.high)
    # Four standard deviations of a binomial.
    assert np.mean(inside) > 0.9 - 4 * math.sqrt(0.9 * 0.1 / 200)


def test_few_clean_inputs_widen_the_interval_upwards() -> None:
    """In the mean over sets of clean inputs that p-values compare with, it holds as often as it says."""
    inside, rng = [], np.random.default_rng(0)
    for seed in range(200):
        risk, uncertainty, wrong = world(2000, 0.3, seed, misled=1.0)
        known = np.sort(rng.exponential(size=100))
        p = (1 + len(known) - np.searchsorted(known, uncertainty)) / (1 + len(known))
        found = error_rate(risk, -np.log(p), LIMIT, len(known), confidence=0.9)
        inside.append(found.low <= wrong.mean() <= found.high)
        assert found.high >= error_rate(risk, -np.log(p), LIMIT, CLEAN, confidence=0.9).high
    assert np.mean(inside) > 0.9 - 4 * math.sqrt(0.9 * 0.1 / 200)


def test_order_has_no_effect() -> None:
    risk, uncertainty, _ = world(400, 0.3)
    tied, order = uncertainty.round(), np.random.default_rng(1).permutation(400)
    assert error_rate(risk[order], tied[order], LIMIT, CLEAN) == pytest.approx(
        error_rate(risk, tied, LIMIT, CLEAN), abs=1e-12
    )


def test_bounds_and_types() -> None:
    same = error_rate(torch.ones(30), torch.full((30,), math.inf), LIMIT, CLEAN)
    assert same.rate == 1 == same.high
    assert error_rate([0.0] * 30, [0.1] * 30, LIMIT, CLEAN)[:2] == (0, 0)


def test_monitor_keeps_the_last_thousand() -> None:
    clean = 100  # the half that the reference counts
    monitor = DriftMonitor(np.random.default_rng(0).exponential(size=2 * clean), wrong_above=LIMIT)
    risk, uncertainty, _ = world(1500, 0.2)
    monitor.update(uncertainty[:29], risk[:29])
    assert monitor.error_rate is None
    monitor.update(uncertainty[29], risk[29])
    assert monitor.error_rate == error_rate(risk[:30], uncertainty[:30], LIMIT, clean)
    monitor.update(uncertainty[30:], risk[30:])
    assert monitor.error_rate == error_rate(risk[500:], uncertainty[500:], LIMIT, clean)
    silent = DriftMonitor(np.arange(100))
    silent.update(uncertainty, risk)
    assert silent.error_rate is None


BAD = [
    (lambda: error_rate([0.1] * 29, [1.0] * 29, 0.1, 100), "at least 30 values for an error rate; it held 29"),
    (lambda: error_rate([0.1] * 30, [1.0] * 31, 0.1, 100), "uncertainty must have shape"),
    (lambda: error_rate([1.1] * 30, [1.0] * 30, 0.1, 100), "risk must lie in"),
    (lambda: error_rate([np.nan] * 30, [1.0] * 30, 0.1, 100), "risk must be finite"),
    (lambda: error_rate([0.1] * 30, [np.nan] * 30, 0.1, 100), "uncertainty must not hold NaN"),
    (
        lambda: error_rate([0.1] * 30, [1.0] * 30, None, 100),
        "wrong_above must be .* it was None: there is none without",
    ),
    (lambda: error_rate([0.1] * 30, [1.0] * 30, -0.1, 100), "wrong_above must be a number from 0 to 1; it was -0.1"),
    (lambda: error_rate([0.1] * 30, [1.0] * 30, "0.1", 100), "wrong_above must be a number"),
    (lambda: error_rate([0.1] * 30, [1.0] * 30, 0.1, 100, confidence=1), "confidence must lie in"),
    (lambda: error_rate([0.1] * 30, [1.0] * 30, 0.1, 0), "clean must be"),
    (lambda: DriftMonitor(np.arange(100), wrong_above=1.5), "wrong_above must be"),
    (lambda: DriftMonitor(np.arange(100), wrong_above=0.1).update([1.0], [0.1, 0.2]), "risk must have shape"),
    (lambda: DriftMonitor(np.arange(100), wrong_above=0.1).update([1.0], [np.nan]), "risk must be finite"),
]
test_bad_arguments = refused([(call, (TypeError, ValueError), words) for call, words in BAD])
