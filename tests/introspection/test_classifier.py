from functools import partial

import numpy as np
import pytest
import torch
from bad_arguments import refused
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastgrad
from fastgrad import IntrospectiveClassifier
from fastgrad.introspection.classifier import watched_of
from fastgrad.losses import LOSSES


@parametrize_with_checks([IntrospectiveClassifier(hidden=(32,), max_epochs=60)])
def test_scikit_learn_api(estimator, check):
    check(estimator)


def problem(count, seed, classes=4, width=6):
    """Features around a mean per class, and the logits of the best linear head."""
    rng = np.random.default_rng(seed)
    means = 2 * np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.integers(0, classes, count)
    features = means[labels] + rng.normal(size=(count, width))
    return features, features @ means.T - 0.5 * (means**2).sum(1), labels


@pytest.mark.parametrize("loss", LOSSES)
def test_pairs_and_rows_give_the_same_prediction(loss):
    features, logits, labels = problem(300, 0)
    classifier = IntrospectiveClassifier(loss=loss, max_epochs=5, hidden=(16,))
    classifier.fit({"features": features, "logits": logits}, labels)
    rows = fastgrad.contrast_rows(torch.tensor(features), torch.tensor(logits), loss=loss).numpy()
    # float64 through and through; the two paths sum N*D = 24 products in another order.
    pairs = classifier.predict_proba({"features": features, "logits": logits})
    np.testing.assert_allclose(classifier.predict_proba(rows), pairs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(classifier.predict_proba(rows.reshape(300, -1)), pairs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(pairs.sum(1), 1)


def test_a_fit_depends_on_no_mode_of_pytorch():
    features, _, labels = problem(100, 0)
    fit = IntrospectiveClassifier(max_epochs=3, hidden=(8,)).fit
    expected = fit(features, labels).predict_proba(features)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            found = fit(features, labels).predict_proba(features)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", ["pairs", "rows"])
def test_learns(form):
    def data(count, seed):
        features, logits, labels = problem(count, seed)
        if form == "pairs":
            return {"features": features, "logits": logits}, labels
        return fastgrad.contrast_rows(torch.tensor(features), torch.tensor(logits)).numpy(), labels

    classifier = IntrospectiveClassifier(hidden=(32, 16)).fit(*data(800, 0))
    R, labels = data(400, 1)
    assert classifier.score(R, labels) > 0.9
    assert classifier.n_iter_ <= classifier.max_epochs
    assert classifier.decision_function(R).shape == (400, 4)


def test_published_shape_is_the_default():
    rng = np.random.default_rng(0)
    R, labels = rng.normal(size=(40, 10, 64)), np.arange(40) % 10
    network = IntrospectiveClassifier(max_epochs=1).fit(R, labels).to_module()
    shapes = [tuple(network.get_buffer(f"weight{i}").shape) for i in range(3)]
    assert shapes == [(300, 640), (100, 300), (10, 100)]


def test_seeds_reproduce():
    features, logits, labels = problem(200, 0)
    R = {"features": features, "logits": logits}
    first, again, other = (
        IntrospectiveClassifier(max_epochs=3, hidden=(8,), random_state=seed).fit(R, labels) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.predict_proba(R), again.predict_proba(R))
    assert (first.predict_proba(R) != other.predict_proba(R)).any()


FEATURES, LOGITS, LABELS = problem(40, 0)
PAIR = {"features": FEATURES, "logits": LOGITS}
BAD = [
    (FEATURES, None, "requires y"),
    (np.full((4, 2, 3), np.nan), np.arange(4) % 2, "R must be finite"),
    ({"features": FEATURES * np.nan, "logits": LOGITS}, LABELS, r"R\['features'\] must be finite"),
    ({"features": FEATURES}, LABELS, "'features' and 'logits'"),
    ({"h": FEATURES}, LABELS, "R must have the entries 'features' and 'logits'; it had .*'h'"),
    ({"features": FEATURES, "logits": LOGITS[:3]}, LABELS, "not of shapes"),
    (FEATURES, LABELS[:5], "y must have shape .*one label per row"),
]
PARAMETERS = [("loss", "hinge"), ("hidden", (0,)), ("hidden", 30), ("max_epochs", 1.5), ("max_epochs", 0)]


def fitted(R=FEATURES, y=LABELS, sources=None, **given):
    return IntrospectiveClassifier(**given).fit(R, y, sources=sources)


test_bad_arguments = refused([
    *((partial(fitted, R, y), ValueError, words) for R, y, words in BAD),
    *((partial(fitted, **{name: value}), (TypeError, ValueError), f"{name} must") for name, value in PARAMETERS),
    (lambda: fitted(sources=np.arange(3)), ValueError, "sources must be integers of shape"),
    (lambda: fitted(1e200 * FEATURES), ValueError, "R must hold numbers whose squares float64 can hold"),
    (lambda: fitted(PAIR, max_epochs=1).predict({"features": FEATURES[:, :3], "logits": LOGITS}), ValueError,
     "R must have the 24 numbers a sample of fit; it had 12"),
])  # fmt: skip


def test_rows_of_any_scale_are_learned():
    R = {"features": 1e30 * FEATURES, "logits": 1e10 * LOGITS}
    classifier = IntrospectiveClassifier(hidden=(4,), max_epochs=2).fit(R, LABELS)
    assert np.isfinite(classifier.predict_proba(R)).all()


@pytest.mark.parametrize(("count", "each", "watched"), [(100, 4, 40), (200, 1, 20), (190, 1, 0), (1, 40, 0)])
def test_samples_of_one_source_decide_together_when_to_stop(count, each, watched):
    """Copies of held-out samples among those trained on would call every epoch a gain; a handful says nothing."""
    sources = np.tile(np.arange(count), each)
    found = watched_of(sources, np.random.RandomState(0))
    assert found.sum() == watched
    assert not set(sources[found]) & set(sources[~found])
