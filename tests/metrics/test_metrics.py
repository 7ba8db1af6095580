"""Metrics against their definitions, written out in loops, and against torchmetrics where it is installed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from bad_arguments import refused
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgrad
from fastgrad import metrics
from fastgrad.metrics.interval import Interval


def scores(seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    clean, hard = rng.normal(size=37), rng.normal(0.8, 1.4, size=23)
    return (clean.round(), hard.round()) if ties else (clean, hard)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tpr", [1e-12, 0.5, 0.95, 1.0])
def test_fpr_at_tpr_by_trying_every_threshold(ties: bool, tpr: float) -> None:
    clean, hard = scores(2, ties)
    thresholds = np.concatenate([clean, hard, [np.inf]])
    rates = [((hard >= t).mean(), (clean >= t).mean()) for t in thresholds]
    assert metrics.fpr_at_tpr(clean, hard, tpr) == min(fpr for hit, fpr in rates if hit >= tpr)


def probabilities(seed: int, samples: int = 200, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)).softmax(1)
    return p, torch.randint(0, classes, (samples,), generator=generator)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_by_its_definition(bins: int) -> None:
    p, y = probabilities(3)
    confidence, prediction = p.max(1)
    total, worst = 0.0, 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = float((confidence[inside].mean() - (prediction == y)[inside].double().mean()).abs())
            total += gap * float(inside.double().mean())
            worst = max(worst, gap)
    assert metrics.ece(p, y, bins=bins) == pytest.approx(total, abs=1e-12)
    assert metrics.mce(p, y, bins=bins) == pytest.approx(worst, abs=1e-12)
    found = metrics.reliability(p, y, bins=bins)
    assert found.counts.sum() == len(y)
    assert found.edges.shape == (bins + 1,)


def test_confidence_at_the_edge_of_a_bin() -> None:
    confidence = np.arange(51, 101) / 100
    found = metrics.reliability(np.stack([confidence, 1 - confidence], 1), np.zeros(50), bins=100)
    assert found.counts[50:].tolist() == [1] * 50
    assert found.edges[51:].tolist() == confidence.tolist()


def test_calibration_error_agrees_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    p, y = probabilities(4)
    for norm, ours in (("l1", metrics.ece), ("max", metrics.mce)):
        theirs = functional.multiclass_calibration_error(p.float(), y, 5, n_bins=15, norm=norm)
        # torchmetrics works in float32.
        assert ours(p, y) == pytest.approx(float(theirs), abs=1e-6)


def risks(errors: Sequence[float]) -> list[float]:
    """The mean of the first k, for every k."""
    return [float(np.mean(errors[:k])) for k in range(1, len(errors) + 1)]


def by_definition(uncertainty: list[float], errors: list[float]) -> np.ndarray:
    """Mean error of the k least uncertain, averaged over every order that ties allow."""
    orders = [
        order
        for order in itertools.permutations(range(len(errors)))
        if all(uncertainty[a] <= uncertainty[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean([risks([errors[i] for i in order]) for order in orders], 0)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 0.5, 2.0])), min_size=1, max_size=6))
def test_curve_and_areas_by_trying_every_order(samples: list[tuple[int, float]]) -> None:
    uncertainty, errors = [float(u) for u, _ in samples], [e for _, e in samples]
    curve = metrics.risk_coverage(uncertainty, errors)
    risk = by_definition(uncertainty, errors)
    np.testing.assert_allclose(curve.risk, risk, rtol=1e-12)
    np.testing.assert_allclose(curve.coverage, np.arange(1, len(errors) + 1) / len(errors))
    assert metrics.aurc(uncertainty, errors) == pytest.approx(risk.mean(), rel=1e-12)
    best = min(np.mean(risks(order)) for order in itertools.permutations(errors))
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


def test_threshold_saves_on_other_digits() -> None:
    """Real images, half of them noisy, and a network that errs on some: better than answering or reviewing all."""
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


BAD = [
    (lambda: metrics.fpr_at_tpr([], [1.0]), "clean must be"),
    (lambda: metrics.fpr_at_tpr([1.0], [[1.0]]), "challenging must be"),
    (lambda: metrics.fpr_at_tpr([np.nan], [1.0]), "clean must be finite"),
    (lambda: metrics.fpr_at_tpr([1.0], [np.nan]), "challenging must be finite"),
    (lambda: metrics.fpr_at_tpr([1.0], [1.0], 0.0), "tpr"),
    (lambda: metrics.ece([0.5, 0.5], [0]), "probabilities must have shape"),
    (lambda: metrics.ece(np.ones((0, 2)), []), "probabilities must have shape"),
    (lambda: metrics.ece([[1.0]], [0]), "probabilities must have shape"),
    (lambda: metrics.ece([[0.5, 0.5]], [0, 1]), "labels must have shape"),
    (lambda: metrics.ece([[0.5, 1.5]], [0]), "lie in"),
    (lambda: metrics.ece([[-0.5, 0.5]], [0]), "lie in"),
    (lambda: metrics.ece([[0.5, 0.5]], [2]), "class indices"),
    (lambda: metrics.ece([[0.5, 0.5]], [-1]), "class indices"),
    (lambda: metrics.ece([[0.5, 0.5]], [0.5]), "class indices"),
    (lambda: metrics.reliability([[0.5, 0.5]], [0], bins=0), "bins"),
    (lambda: metrics.reliability([[0.5, 0.5]], [0], bins=2.5), "bins must be an integer"),
    (lambda: metrics.aurc([], []), "errors must be a non-empty vector"),
    (lambda: metrics.aurc([[1.0]], [[1.0]]), "errors must be a non-empty vector"),
    (lambda: metrics.aurc([1.0], [1.0, 0.0]), "uncertainty must have shape"),
    (lambda: metrics.aurc([np.nan], [1.0]), "uncertainty must not hold NaN"),
    (lambda: metrics.aurc([-np.inf], [1.0]), "uncertainty must not hold NaN or minus infinity"),
    (lambda: metrics.aurc([1.0], [-1.0]), "errors must be at least 0"),
    (lambda: metrics.aurc([1.0], [np.inf]), "errors must be finite"),
    (lambda: metrics.threshold_for([np.nan], [1], cost_of_error=1, cost_of_review=1), "risk must not hold NaN"),
    (lambda: metrics.threshold_for([1.0], [1], cost_of_error=0, cost_of_review=1), "cost_of_error must"),
    (lambda: metrics.threshold_for([1.0], [1], cost_of_error=1, cost_of_review=np.nan), "cost_of_review must"),
]
NO_NUMBERS = [
    ([1j, 2], "Complex data not supported"),
    (torch.tensor([1j, 2]), "Complex data not supported"),
    (torch.tensor([1.0, 2.0]).to_sparse(), "Sparse layout"),
    (torch.zeros(2, device="meta"), "meta tensor"),
    ([[1.0], [1.0, 2.0]], "inhomogeneous"),
    (["a", "b"], "could not convert"),
]
TAKES_NUMBERS = {
    "clean": lambda value: metrics.fpr_at_tpr(value, [1.0]),
    "probabilities": lambda value: metrics.ece(value, [0, 1]),
    "errors": lambda value: metrics.aurc([0.1, 0.2], value),
    "uncertainty": lambda value: metrics.aurc(value, [0, 1]),
    "risk": lambda value: metrics.threshold_for(value, [0, 1], cost_of_error=1, cost_of_review=1),
}
test_bad_arguments = refused([
    *((call, ValueError, words) for call, words in BAD),
    *((partial(call, value), (TypeError, ValueError), f"{name} must be numeric; .*{why}")
      for name, call in TAKES_NUMBERS.items() for value, why in NO_NUMBERS),
    *((partial(metrics.fpr_at_tpr, [1.0], [2.0], tpr), TypeError, "tpr must be a number; it was")
      for tpr in (None, "0.95", True, [0.95])),
])  # fmt: skip


def test_values_of_one_source_count_once() -> None:
    values = np.random.default_rng(0).normal(size=100)
    once, twice = Interval.of(values, np.arange(100)), Interval.of(np.tile(values, 2), np.tile(np.arange(100), 2))
    assert twice == pytest.approx(once)
    assert once.half == pytest.approx(1.96 * values.std() / 10)
