from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad import metrics


def by_definition(uncertainty: list[float], errors: list[float]) -> np.ndarray:
    """Mean error of the k least uncertain, averaged over every order that ties allow."""
    n = len(errors)
    orders = [
        order
        for order in itertools.permutations(range(n))
        if all(uncertainty[a] <= uncertainty[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean([[np.mean([errors[i] for i in order[:k]]) for k in range(1, n + 1)] for order in orders], 0)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 0.5, 2.0])), min_size=1, max_size=6))
def test_curve_and_areas_by_trying_every_order(samples: list[tuple[int, float]]) -> None:
    uncertainty, errors = [float(u) for u, _ in samples], [e for _, e in samples]
    curve = metrics.risk_coverage(uncertainty, errors)
    risk = by_definition(uncertainty, errors)
    np.testing.assert_allclose(curve.risk, risk, rtol=1e-12)
    np.testing.assert_allclose(curve.coverage, np.arange(1, len(errors) + 1) / len(errors))
    assert metrics.aurc(uncertainty, errors) == pytest.approx(risk.mean(), rel=1e-12)
    best = min(
        np.mean([np.mean(order[:k]) for k in range(1, len(errors) + 1)]) for order in itertools.permutations(errors)
    )
    assert metrics.e_aurc(uncertainty, errors) == pytest.approx(risk.mean() - best, abs=1e-12)
    assert metrics.e_aurc(errors, errors) == pytest.approx(0, abs=1e-12)


def test_areas_of_known_orders() -> None:
    """A useless uncertainty has the error rate as its area; with none of m of n wrong, the perfect one is known."""
    n, wrong = 500, 60
    errors = np.arange(n) >= n - wrong
    assert metrics.aurc(np.zeros(n), errors) == pytest.approx(wrong / n)
    perfect = sum(max(0, k - (n - wrong)) / k for k in range(1, n + 1)) / n
    assert metrics.aurc(np.arange(n), errors) == pytest.approx(perfect, rel=1e-12)
    # Geifman, Uziel and El-Yaniv's approximation for large n.
    r = wrong / n
    assert perfect == pytest.approx(r + (1 - r) * np.log(1 - r), rel=0.02)
    assert metrics.e_aurc(torch.arange(n), torch.tensor(errors)) == pytest.approx(0, abs=1e-15)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 2.0, 3.0, np.inf]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12
    ),
    st.sampled_from([0.5, 1.0, 2.0, 10.0]),
)
def test_threshold_by_trying_every_one(samples: list[tuple[float, float]], ratio: float) -> None:
    uncertainty, errors = (np.array(part) for part in zip(*samples, strict=True))
    found = metrics.threshold_for(uncertainty, errors, cost_of_error=ratio, cost_of_review=1.0)

    def cost(threshold: float) -> float:
        reviewed = (uncertainty > threshold) | np.isinf(uncertainty)
        return float((ratio * errors * ~reviewed + reviewed).mean())

    tried = [-np.inf, *(value for value in np.unique(uncertainty) if np.isfinite(value))]
    costs = np.array([cost(threshold) for threshold in tried])
    assert found in tried
    assert cost(found) == pytest.approx(costs.min(), abs=1e-12)
    assert found == max(t for t, c in zip(tried, costs, strict=True) if c <= costs.min() + 1e-12)


def test_threshold_follows_the_costs() -> None:
    """The chance of an error equals the uncertainty: a review pays off from the ratio of the costs on."""
    rng = np.random.default_rng(0)
    uncertainty = rng.random(200_000)
    errors = rng.random(200_000) < uncertainty
    for review in (0.1, 0.5, 0.9):
        found = metrics.threshold_for(uncertainty, errors, cost_of_error=1.0, cost_of_review=review)
        # The cost is a random walk around a parabola; its lowest point wanders by some n^(-1/3).
        assert abs(found - review) < 3 * 200_000 ** (-1 / 3)
    assert metrics.threshold_for(uncertainty, errors, cost_of_error=1.0, cost_of_review=2.0) == uncertainty.max()
    always_wrong = metrics.threshold_for([0.1, 0.2], [1, 1], cost_of_error=5.0, cost_of_review=1.0)
    assert always_wrong == -np.inf


def test_threshold_saves_on_digits_that_it_was_not_chosen_on() -> None:
    """Real images, half of them noisy, and a network that errs on some: better than answering or reviewing all."""
    import torch

    import fastgrad
    from fastgrad.commands.demo import digit_network, digits

    torch.manual_seed(0)
    digit_images, labels = digits(torch.Generator().manual_seed(0))
    test, answers = digit_images[1200:], labels[1200:]
    net = digit_network()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for pick in torch.cat([torch.randperm(800) for _ in range(4)]).split(50):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(digit_images[pick]), labels[pick]).backward()
        optimizer.step()
    net.eval()
    clean = [(digit_images[800:1200], labels[800:1200])]
    model = fastgrad.TwoStageModel(net, blocks=["logits", "activations"]).fit(clean)
    count = len(test)
    noise = (torch.rand(count, 1, 1, 1) - 0.5).clamp_min(0) * torch.randn(test.shape)
    images = test + noise
    risk = torch.cat([model(part).risk for part in images.split(250)])
    with torch.no_grad():
        wrong = net(images).argmax(1) != answers
    assert 0.03 < wrong.float().mean() < 0.6
    chosen, new = slice(0, count // 2), slice(count // 2, count)
    for error, review in ((10.0, 1.0), (3.0, 1.0)):
        threshold = fastgrad.threshold_for(risk[chosen], wrong[chosen], cost_of_error=error, cost_of_review=review)
        reviewed = risk[new] > threshold
        cost = float((error * (wrong[new] & ~reviewed) + review * reviewed).mean())
        assert cost < 0.9 * min(review, error * float(wrong[new].float().mean()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.aurc([], []), "errors must be a non-empty vector"),
        (lambda: metrics.aurc([1.0], [1.0, 0.0]), "uncertainty must have shape"),
        (lambda: metrics.aurc([np.nan], [1.0]), "uncertainty must not hold NaN"),
        (lambda: metrics.aurc([-np.inf], [1.0]), "uncertainty must not hold NaN or minus infinity"),
        (lambda: metrics.aurc([1.0], [-1.0]), "errors must be at least 0"),
        (lambda: metrics.aurc([1.0], [np.inf]), "errors must be finite"),
        (lambda: metrics.threshold_for([np.nan], [1], cost_of_error=1, cost_of_review=1), "risk must not hold NaN"),
        (lambda: metrics.threshold_for([1.0], [1], cost_of_error=0, cost_of_review=1), "cost_of_error must"),
        (lambda: metrics.threshold_for([1.0], [1], cost_of_error=1, cost_of_review=np.nan), "cost_of_review must"),
    ],
)
def test_errors_name_the_argument(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
