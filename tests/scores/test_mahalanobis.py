import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.covariance import ledoit_wolf

from fastgrad.scores.fitted import rebuild
from fastgrad.scores.mahalanobis import DIRECTIONS, Mahalanobis, principal, shrinkage

EPS = float(np.finfo(np.float64).eps)


def decaying(n, d, seed, factors=30):
    """Rows with some strong directions over noise, as activations have."""
    rng = np.random.default_rng(seed)
    loadings = np.random.default_rng(99).normal(size=(factors, d)) * np.linspace(3, 0.3, factors)[:, None]
    return rng.normal(size=(n, factors)) @ loadings + rng.normal(size=(n, d)) + 5


@pytest.mark.parametrize(("n", "d"), [(600, 40), (90, 90), (600, 400), (60, 400), (50, 51), (40, 800)])
def test_all_directions_are_ledoit_and_wolf(n, d):
    rows, new = decaying(n, d, 0), decaying(50, d, 1)
    score = Mahalanobis.fit(torch.as_tensor(rows), directions=d)
    covariance, _ = ledoit_wolf(rows)
    centred = new - rows.mean(0)
    expected = np.einsum("bd,bd->b", centred, np.linalg.solve(covariance, centred.T).T)
    # Two solutions of a system of condition c round by c eps, and the sums by a thousand terms.
    condition = np.linalg.cond(covariance)
    np.testing.assert_allclose(score(torch.tensor(new)), expected, rtol=1e3 * condition * EPS)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (30, 200), (20, 20)])
def test_shrinkage_is_that_of_scikit_learn(n, d):
    rows = decaying(n, d, 2)
    centred = torch.tensor(rows - rows.mean(0))
    rho, mean = shrinkage(principal(centred, d)[0], centred)
    assert rho == pytest.approx(ledoit_wolf(rows)[1], rel=1e-9)
    assert mean == pytest.approx(rows.var(0).mean(), rel=1e-12)


def test_many_more_columns_than_rows():
    """``(rho m I + c X^T X)^-1`` by Woodbury's identity: matrices of 100 rows."""
    n, d = 100, 5000
    rows, new = decaying(n, d, 3), decaying(30, d, 4)
    score = Mahalanobis.fit(torch.as_tensor(rows), directions=d)
    X, z = rows - rows.mean(0), new - rows.mean(0)
    gram = X @ X.T
    average = np.trace(gram) / n / d
    squares = np.square(gram / n).sum()
    error = (np.square(np.diag(gram)).mean() - squares) / (n * d)
    rho = error / (squares / d - average**2)
    floor, share = rho * average, (1 - rho) / n
    cross = z @ X.T
    inside = np.linalg.solve(np.eye(n) * floor / share + gram, cross.T).T
    expected = (np.square(z).sum(1) - (cross * inside).sum(1)) / floor
    np.testing.assert_allclose(score(torch.tensor(new)), expected, rtol=1e-9)


def test_fewer_directions_keep_the_order():
    rows, new = decaying(400, 3000, 5), np.concatenate([decaying(100, 3000, 6), 1.1 * decaying(50, 3000, 7)])
    exact, kept = Mahalanobis.fit(torch.as_tensor(rows), directions=3000), Mahalanobis.fit(torch.as_tensor(rows))
    assert exact.directions.shape == (3000, 399)
    assert kept.directions.shape == (3000, DIRECTIONS)
    assert spearmanr(kept(torch.tensor(new)), exact(torch.tensor(new))).statistic > 0.95


def test_residual_counts_by_its_variance():
    """With n far above d, rho is nearly 0: a weight of 1 / (rho m) outside would drown the rest."""
    rows, new = decaying(4000, 60, 8, factors=60), decaying(500, 60, 9, factors=60)
    exact, kept = (
        Mahalanobis.fit(torch.as_tensor(rows), directions=60),
        Mahalanobis.fit(torch.as_tensor(rows), directions=40),
    )
    assert float(exact.rest) == 0
    assert spearmanr(kept(torch.tensor(new)), exact(torch.tensor(new))).statistic > 0.8


def test_deterministic_and_stored():
    rows, new = decaying(50, 300, 10), torch.tensor(decaying(20, 300, 11))
    score = Mahalanobis.fit(torch.as_tensor(rows))
    again = Mahalanobis.fit(torch.as_tensor(rows))
    stored = rebuild(score.spec(), score.state_dict())
    assert torch.equal(score(new), again(new))
    assert torch.equal(score(new), stored(new))
    # Alone or among others, up to the order in which a product is summed.
    alone = torch.cat([score(row[None]) for row in new])
    np.testing.assert_allclose(alone, score(new), rtol=1e-9)


@pytest.mark.parametrize(
    "rows", [np.ones((30, 4)), np.ones((5, 40)), np.eye(2, 7), np.zeros((1, 3)), np.linspace(0, 0.5, 30)[:, None]]
)
def test_rows_that_hardly_vary_are_harmless(rows):
    score = Mahalanobis.fit(torch.as_tensor(rows))
    scores = score(torch.tensor(np.concatenate([rows, rows + 1])))
    assert torch.isfinite(scores).all()
    assert (scores[len(rows) :] > scores[: len(rows)]).all()


def test_nan_stays_nan():
    rows = decaying(30, 100, 12)
    new = torch.tensor(rows[:2])
    new[0, 3] = torch.nan
    assert torch.isnan(Mahalanobis.fit(torch.as_tensor(rows))(new)).tolist() == [True, False]
