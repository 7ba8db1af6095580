"""The noisy-or of the answer's own probability and the evidence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from fastgrad.detector.constants import CERTAINTY
from fastgrad.detector.risk import NoisyOr, certainty_of, doubt


def drawn(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, evidence of two sources, events that only the first causes, and which inputs are challenges."""
    rng = np.random.default_rng(0)
    challenging = rng.random(count) < 0.7
    evidence = rng.exponential(np.where(challenging, 6.0, 1.0)[:, None], (count, 2))
    known = rng.random(count) * 0.4
    misled = expit(2 * np.log1p(evidence[:, 0]) - 4)
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
    other.fit(np.log1p(evidence.numpy()), challenging.numpy(), sample_weight=weights)
    np.testing.assert_allclose(found.weight.numpy(), other.coef_[0], rtol=2e-3)
    np.testing.assert_allclose(float(found.bias), other.intercept_[0], rtol=2e-3)


def test_finds_the_source_that_misleads() -> None:
    known, evidence, event, challenging = drawn(20000)
    found = NoisyOr.fit(known, evidence, event, challenging)
    assert abs(float(found.weight[0]) - 2) < 0.2
    assert float(found.weight[1]) < 0.1
    assert abs(float(found.bias) + 4) < 0.4
    risk = found(known, evidence)
    assert (risk >= known).all()
    assert (found.raised(known, evidence) >= 0).all()
    torch.testing.assert_close(risk, 1 - (1 - known) * (1 - torch.sigmoid(found.log_odds(evidence))))
    # As often right as it says, in each tenth of the answers.
    for part in risk.argsort().chunk(10):
        assert abs(float(risk[part].mean()) - float(event[part].double().mean())) < 0.04


def test_evidence_against_a_certain_answer_weighs_more() -> None:
    known, evidence, _, challenging = drawn(20000)
    known, amounts = known.square(), evidence.log1p()
    certainty, uniform = certainty_of(known), torch.rand(len(known), generator=torch.Generator().manual_seed(0))

    def fitted(certain: float) -> NoisyOr:
        misled = torch.sigmoid(0.5 * amounts.sum(1) + certain * certainty * amounts[:, 1] - 4)
        return NoisyOr.fit(known, evidence, uniform < known + (1 - known) * misled, challenging)

    # The penalty holds it back.
    assert float(fitted(0).certain) < 2 < 8 < float(fitted(20).certain) < 22
    found = fitted(20)
    risk, doubtful = found(known, evidence), found(known, evidence / 2)
    assert (risk > doubtful).all()
    assert (found.raised(known, evidence) > 0).all()


def test_certainty_is_finite() -> None:
    doubts = torch.tensor([0.0, 1e-300, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(certainty_of(doubts), torch.tensor([20, 20, np.log(9), 0, 0, 0]).double() / CERTAINTY)


def test_without_challenges_the_risk_is_the_answers_own() -> None:
    known, evidence, event, challenging = drawn(50)
    found = NoisyOr.fit(known, evidence, event, torch.zeros_like(challenging))
    assert torch.equal(found(known, evidence), known)


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
