"""Certified thresholds: each promise against sums of exact probabilities."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from bad_arguments import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

import fastgrad
from fastgrad.metrics import certified_threshold, false_alarm_threshold


def answered(risk: np.ndarray, errors: np.ndarray, max_error: float, confidence: float) -> float:
    """The threshold; minus infinity if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = certified_threshold(risk, errors, max_error, confidence)
    return -math.inf if found is None else found


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_one_candidate_is_certified_by_the_exact_binomial_tail(data: st.DataObject) -> None:
    n = data.draw(st.integers(50, 300))
    k = data.draw(st.integers(0, 10))
    confidence = data.draw(st.sampled_from([Fraction(9, 10), Fraction(19, 20), Fraction(99, 100)]))
    limit = Fraction(data.draw(st.integers(20, 120)), 1000)
    tail = sum(math.comb(n, i) * limit**i * (1 - limit) ** (n - i) for i in range(k + 1))
    # The fewest inputs without an error: below, nothing is promised.
    possible = (1 - limit) ** n <= 1 - confidence
    errors = np.arange(n) < k
    if possible:
        found = answered(np.zeros(n), errors, float(limit), float(confidence))
        assert (found == 0) == (tail <= 1 - confidence)
        # The same as Clopper and Pearson's upper bound.
        assert (found == 0) == (beta.ppf(float(confidence), k + 1, n - k) <= float(limit))
    else:
        with pytest.raises(ValueError, match="risk must hold at least"):
            answered(np.zeros(n), errors, float(limit), float(confidence))


@pytest.mark.parametrize("confidence", [0.7, 0.9])
@pytest.mark.parametrize("cells", [2, 3])
def test_the_exact_probability_of_a_broken_promise(cells: int, confidence: float) -> None:
    """Risks take a few values; the probabilities of all samples add up to the level of the procedure."""
    n, limit = (12, 0.3) if cells == 2 else (9, 0.3)
    samples = [
        (sizes, wrong)
        for sizes in itertools.product(range(n + 1), repeat=cells)
        if sum(sizes) == n
        for wrong in itertools.product(*(range(size + 1) for size in sizes))
    ]
    found = []
    for sizes, wrong in samples:
        risk = np.repeat(np.arange(cells), sizes)
        errors = np.concatenate([np.arange(size) < bad for size, bad in zip(sizes, wrong, strict=True)])
        found.append(answered(risk, errors, limit, confidence))
    worst = 0.0
    for rates in itertools.combinations_with_replacement([0.02, 0.2, 0.299, 0.301, 0.45, 0.9], cells):
        for mass in ([1 / cells] * cells, [0.8, *[0.2 / (cells - 1)] * (cells - 1)]):
            broken = 0.0
            for (sizes, wrong), threshold in zip(samples, found, strict=True):
                inside = max(int(threshold) + 1, 0) if threshold > -math.inf else 0
                if inside and np.dot(mass[:inside], rates[:inside]) / sum(mass[:inside]) > limit:
                    chance = float(math.factorial(n))
                    for size, bad, rate, share in zip(sizes, wrong, rates, mass, strict=True):
                        chance *= share**size / math.factorial(size)
                        chance *= math.comb(size, bad) * rate**bad * (1 - rate) ** (size - bad)
                    broken += chance
            worst = max(worst, broken)
    assert worst <= 1 - confidence
    # Not by wide margins: the promise costs no more answers than it must.
    assert worst > 0.2 * (1 - confidence)


def test_it_answers_most_where_the_score_is_good() -> None:
    rng = np.random.default_rng(0)
    risk = torch.from_numpy(rng.random(4000)).float()
    errors = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.4 * (risk - 0.8).clamp_min(0) / 0.2
    threshold = fastgrad.certified_threshold(risk, errors)
    assert threshold in risk.double().tolist()
    assert 0.85 < float((risk <= threshold).float().mean()) < 0.95  # .9 has an error rate of 2 % among its answers
    # Infinite risks are never answered.
    risk[errors] = math.inf
    assert fastgrad.certified_threshold(risk, errors) == float(risk[~errors].max())


def test_why_there_is_none() -> None:
    rng = np.random.default_rng(0)
    risk, errors = rng.random(400), rng.random(400)
    with pytest.warns(UserWarning, match="no threshold certifies max_error=0.02 .* on 400 inputs.* 4 times as many"):
        assert certified_threshold(risk, errors < 0.01) is None
    with pytest.warns(UserWarning, match="even 16 times as many"):
        assert certified_threshold(risk, errors < 0.3) is None


@settings(deadline=None, max_examples=60)
@given(
    st.integers(20, 2000), st.sampled_from([0.01, 0.05, 0.1]), st.sampled_from([0.9, 0.95, 0.99]), st.integers(0, 99)
)
def test_false_alarms_by_the_order_statistics(n: int, rate: float, confidence: float, seed: int) -> None:
    scores = np.random.default_rng(seed).random(n)
    if (1 - rate) ** n > 1 - confidence:
        with pytest.raises(ValueError, match="uncertainty must hold at least"):
            false_alarm_threshold(scores, rate, confidence)
        return
    alarms = int((scores > false_alarm_threshold(scores, rate, confidence)).sum())
    # Of n uniform scores the share above the one with j larger ones follows Beta(j + 1, n - j).
    assert beta.cdf(rate, alarms + 1, n - alarms) >= confidence - 1e-12
    assert beta.cdf(rate, alarms + 2, n - alarms - 1) < confidence + 1e-12


def test_one_answer_may_suffice() -> None:
    certified_threshold([0.1], [0], 0.5, 0.4)


BAD = [
    (lambda: certified_threshold(np.zeros(148), np.zeros(148)), "at least 149 .* 148, which could promise"),
    (lambda: certified_threshold(np.full(200, np.inf), np.zeros(200)), "at least 149 .* there were 0"),
    (lambda: certified_threshold(np.zeros(200), np.zeros(199)), "risk must have shape"),
    (lambda: certified_threshold(np.zeros(200), np.full(200, 0.5)), "errors must be 0 .right. or 1"),
    (lambda: certified_threshold(np.zeros(200), np.zeros(200), 0), "max_error must lie in"),
    (lambda: certified_threshold(np.zeros(200), np.zeros(200), 1), "max_error must lie in"),
    (lambda: certified_threshold(np.zeros(200), np.zeros(200), confidence=1.0), "confidence must lie in"),
    (lambda: certified_threshold([], []), "errors must be a non-empty vector"),
    (lambda: certified_threshold([np.nan] * 200, np.zeros(200)), "risk must not hold NaN"),
    (lambda: false_alarm_threshold(np.zeros(58)), "at least 59 .* 58, which could promise max_rate=0.05"),
    (lambda: false_alarm_threshold([np.nan] * 100), "uncertainty must not hold NaN"),
    (lambda: false_alarm_threshold(np.zeros((60, 2))), "uncertainty must be a non-empty vector"),
    (lambda: false_alarm_threshold(np.zeros(100), 1.0), "max_rate must lie in"),
]
test_bad_arguments = refused(
    [(call, ValueError, words) for call, words in BAD]
    + [(partial(certified_threshold, [0] * 200, [0] * 200, **{name: "0.1"}), TypeError, f"{name} must be a number")
       for name in ("max_error", "confidence")]
)  # fmt: skip
