"""The noisy-or of the answer's own probability and the evidence."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from fastgrad.detector.report import probability_suffices
from fastgrad.detector.risk import NoisyOr, Risk, doubt, misleading


def drawn(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, evidence of two sources, events that only the first causes, and which inputs are challenges."""
    rng = np.random.default_rng(0)
    challenging = rng.random(count) < 0.7
    evidence = rng.exponential(np.where(challenging, 6.0, 1.0)[:, None], (count, 2))
    known = rng.random(count) * 0.4
    misled = expit(evidence[:, 0] - 4)
    event = rng.random(count) < known + (1 - known) * misled
    return tuple(torch.from_numpy(v) for v in (known, evidence, event, challenging))  # type: ignore[return-value]


# Of scikit-learn before 1.7 with SciPy from 1.16.
@pytest.mark.filterwarnings("ignore:scipy.optimize. The `disp` and `iprint` options:DeprecationWarning")
def test_without_another_cause_it_is_a_logistic_regression() -> None:
    _, evidence, _, challenging = drawn()
    found = NoisyOr.fit(None, evidence, challenging, challenging)
    # Scikit-learn's objective is C times the weighted losses plus ||w||^2 / 2.
    count = len(evidence)
    weights = np.where(challenging, 0.5 / challenging.sum(), 0.5 / (~challenging).sum()) * count
    other = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000)
    other.fit(evidence.numpy(), challenging.numpy(), sample_weight=weights)
    np.testing.assert_allclose(found.weight.numpy(), other.coef_[0], rtol=2e-3)
    np.testing.assert_allclose(float(found.bias), other.intercept_[0], rtol=2e-3)


def test_finds_the_source_that_misleads() -> None:
    known, evidence, event, challenging = drawn(20000)
    found = NoisyOr.fit(known, evidence, event, challenging)
    assert abs(float(found.weight[0]) - 1) < 0.1
    assert float(found.weight[1]) < 0.1
    assert abs(float(found.bias) + 4) < 0.4
    risk = found(known, evidence)
    assert (risk >= known).all()
    torch.testing.assert_close(risk, 1 - (1 - known) * (1 - torch.sigmoid(found.log_odds(evidence))))
    # As often right as it says, in each tenth of the answers.
    for part in risk.argsort().chunk(10):
        assert abs(float(risk[part].mean()) - float(event[part].double().mean())) < 0.04


def of_two_kinds(count: int = 20000) -> tuple[torch.Tensor, ...]:
    """Doubt, evidence, log probabilities of clean and two kinds, wrong answers, kinds: the second misleads, usually."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, count)
    logits = rng.normal(size=(count, 3)) + 3 * np.eye(3)[kinds]
    log_p = torch.from_numpy(logits).log_softmax(1)
    known = rng.random(count) * 0.2
    wrong = rng.random(count) < known + (1 - known) * np.array([0.0, 0.1, 0.9])[kinds]
    evidence = torch.stack([torch.from_numpy(rng.exponential(1.0, count)), -log_p[:, 0]], 1)
    return torch.from_numpy(known), evidence, log_p, torch.from_numpy(wrong), torch.from_numpy(kinds)


def test_resemblance_to_what_misleads_counts_most() -> None:
    known, evidence, log_p, wrong, kinds = of_two_kinds()
    found = Risk.fit(known, evidence, log_p, wrong, kinds)
    torch.testing.assert_close(found.rates, torch.tensor([0.0, 0.19, 0.91]).double(), rtol=0, atol=0.02)
    risk = found(known, evidence, log_p)
    assert (risk >= known).all()
    above = risk[kinds == 0] > found.options["wrong_above"]
    assert above.sum() == wrong[kinds == 0].sum() > 0
    assert abs(float(risk.mean()) - float(wrong.double().mean())) < 0.02
    raised = found.raised(known, evidence, log_p)
    assert (raised >= 0).all()
    assert float(raised[kinds == 2, 1].mean()) > 3 * float(raised[kinds == 1, 1].mean())
    # As many challenges, whose kind says nothing.
    blind = NoisyOr.fit(known, evidence, wrong, kinds > 0)
    assert log_loss(wrong, risk) < log_loss(wrong, blind(known, evidence)) - 0.1


def log_loss(event: torch.Tensor, p: torch.Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy(p, event.double()))


def test_odds_replace_the_classifiers_evidence() -> None:
    log_p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).log()
    evidence = torch.tensor([[1.0, 5.0], [2.0, 0.0], [3.0, torch.inf]], dtype=torch.float64)
    found = misleading(evidence, log_p, torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64))
    expected = torch.tensor([[1.0, 1 + 3 / 7 * 10], [2.0, 1.0], [3.0, 41.0]], dtype=torch.float64)
    expected[:, 1].log_()
    torch.testing.assert_close(found, expected)
    assert misleading(evidence, log_p[:, :0], evidence.new_empty(0)) is evidence


def test_a_kind_that_is_rare_makes_nothing_certain() -> None:
    known, evidence, log_p, wrong, kinds = (values[:40].clone() for values in of_two_kinds())
    kinds[kinds == 2] = 1
    kinds[0], wrong[0] = 2, True
    found = Risk.fit(known, evidence, log_p, wrong, kinds)
    torch.testing.assert_close(found.rates[[0, 2]], torch.tensor([0, 2 / 3]).double())


def test_without_challenges_the_risk_is_the_answers_own() -> None:
    known, evidence, event, challenging = drawn(50)
    found = NoisyOr.fit(known, evidence, event, torch.zeros_like(challenging))
    assert torch.equal(found(known, evidence), known)
    nothing = evidence[:, :0]
    risk = Risk.fit(known, evidence, nothing, event, torch.zeros(50, dtype=torch.int64))
    assert torch.equal(risk(known, evidence, nothing), known)
    assert risk.options["wrong_above"] is None


def test_what_is_no_number_is_a_risk_of_one() -> None:
    known, evidence, event, challenging = drawn(200)
    evidence[3] = torch.nan
    found = NoisyOr.fit(known, evidence, event, challenging)
    assert found.weight.isfinite().all()
    evidence[4, 0], known[5] = torch.inf, torch.nan
    risk = found(known, evidence)
    assert (risk[3:6] == 1).all()
    assert (risk[6:] < 1).all()


def test_doubt_is_accurate_where_the_answer_is_certain() -> None:
    logits = torch.tensor([[0.0, -40.0]], dtype=torch.float64)
    torch.testing.assert_close(doubt(logits.log_softmax(1)), torch.tensor([np.exp(-40.0)]).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("risk", "doubt", "said"),
    [
        ((0, 1), (0, 2), "ranks wrong answers to clean inputs as well: AUROC 0.9"),
        ((0, 2), (0, 2), r"by the risk \+0\.000 \+- 0\.000"),
        ((0, 2), (0, 0), "^$"),
    ],
)
def test_report_says_that_probability_suffices(
    risk: tuple[float, float], doubt: tuple[float, float], said: str
) -> None:
    wrong = np.arange(400) < 100
    noise = np.random.default_rng(0).normal(size=400)
    # The same noise on both, and a step at the errors.
    own, other = (noise + np.where(wrong, high, low) for low, high in (risk, doubt))
    assert re.search(said, probability_suffices(own, other, wrong))
    assert not probability_suffices(noise, noise, np.zeros(400, bool))
