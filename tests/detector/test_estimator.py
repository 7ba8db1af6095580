import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from bad_arguments import refused
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastgrad import UncertaintyDetector
from fastgrad.losses import contrast_norms


@parametrize_with_checks(
    [UncertaintyDetector(folds=2), UncertaintyDetector(calibration_fraction=0.4, folds=2, log=False)]
)
def test_scikit_learn_api(estimator, check):
    check(estimator)


def network_like(count, seed, shift=0.0, classes=5, parameters=4):
    """Blocks as a network would give them; ``shift`` makes them less usual."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)) + 6 * np.eye(classes)[rng.integers(0, classes, count)]
    logits -= shift * logits * 0.3
    norms = contrast_norms(torch.tensor(logits), loss="cross_entropy").numpy()
    scales = np.exp(rng.normal(size=(count, 1, parameters)) * 0.3 + np.arange(parameters) + shift)
    contrasts = norms[:, :, None] * scales
    contrasts[:, :, -1] = norms  # a last bias
    return {
        "contrasts": contrasts,
        "gradients": contrasts.sum(1),
        "logits": logits,
        "features": rng.normal(size=(count, 6)) + shift,
        "image": rng.normal(size=(count, 28)) * (1 + shift),
    }


def joined(*parts):
    """Rows of matrices, or of blocks, one after another."""
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)


SHAPES = {
    "(B, N)": lambda blocks: {"contrasts": blocks["contrasts"][:, :, -1]},
    "(B, P)": lambda blocks: blocks["gradients"],
    "(B, S, P)": lambda blocks: np.stack([blocks["gradients"], 2 * blocks["gradients"] ** 2], 1),
    "(B, N, P)": lambda blocks: {"contrasts": blocks["contrasts"]},
    "(B, S, N, P)": lambda blocks: {"contrasts": np.stack([blocks["contrasts"]] * 2, 1)},
    "blocks": lambda blocks: blocks,
    "logits and features": lambda blocks: {name: blocks[name] for name in ("logits", "features")},
}


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_higher_is_less_reliable_for_every_feature_matrix(kind, labels):
    make = SHAPES[kind]
    clean, odd, new, worse = (make(network_like(300, seed, shift)) for seed, shift in ((0, 0), (1, 2), (2, 0), (3, 2)))
    detector = UncertaintyDetector(folds=3)
    if labels:
        detector.fit(joined(clean, odd), np.repeat([0, 1], 300))
    else:
        detector.fit(clean)
    scores = np.concatenate([detector.decision_function(new), detector.decision_function(worse)])
    assert np.isfinite(scores).all()
    assert roc_auc_score(np.repeat([0, 1], 300), scores) > 0.85
    np.testing.assert_array_equal(detector.predict(new), (scores[:300] > detector.threshold()).astype(int))


def test_class_names_do_not_matter():
    blocks, permuted = network_like(200, 0), network_like(200, 0)
    order = np.array([3, 1, 4, 0, 2])
    for name in ("contrasts", "logits"):
        permuted[name] = permuted[name][:, order]
    detector = UncertaintyDetector().fit(blocks)
    scores, other = (detector.decision_function(each) for each in (blocks, permuted))
    np.testing.assert_allclose(other, scores, rtol=1e-9, atol=1e-9)
    alone = [{"contrasts": each["contrasts"]} for each in (blocks, permuted)]
    plain = UncertaintyDetector().fit(alone[0])
    np.testing.assert_allclose(plain.decision_function(alone[1]), plain.decision_function(alone[0]), rtol=1e-9)


def test_one_class_scores_catch_what_challenges_never_showed():
    """The classifier, trained on one side, takes the other side for very safe; the scores beside it do not."""
    rng = np.random.default_rng(0)
    clean, seen, unseen, new = (np.exp(rng.normal(size=(600, 4)) + shift) for shift in (0, 2.5, -4.0, 0))
    X, y = np.concatenate([clean, seen]), np.repeat([0, 1], 600)
    detector = UncertaintyDetector().fit(X, y)
    scores = detector.decision_function(np.concatenate([new, unseen]))
    assert roc_auc_score(np.repeat([0, 1], 600), scores) > 0.9
    alone = detector.explain(np.concatenate([new, unseen]))["challenges"]
    assert roc_auc_score(np.repeat([0, 1], 600), alone) < 0.2


def test_features_of_any_sign():
    rng = np.random.default_rng(0)
    X, odd = rng.normal(size=(200, 6)), rng.normal(size=(200, 6)) + 3
    detector = UncertaintyDetector(log=False).fit(X)
    assert roc_auc_score(np.repeat([0, 1], 200), detector.decision_function(np.concatenate([X, odd]))) > 0.95
    with pytest.raises(ValueError, match="log=False for features of any sign"):
        UncertaintyDetector().fit(X)


def test_zeros_and_extremes_are_scored():
    X = network_like(200, 0)["gradients"]
    detector = UncertaintyDetector().fit(X)
    scores = detector.decision_function(np.stack([np.zeros(4), np.full(4, 1e-300), np.full(4, 1e300), X[0]]))
    assert np.isfinite(scores).all()
    assert (scores[:3] > scores[3]).all()


def test_logarithms_give_the_same_scores_as_norms():
    X, new = network_like(200, 0)["gradients"], network_like(50, 1)["gradients"]
    plain = UncertaintyDetector().fit(X).decision_function(new)
    logs = UncertaintyDetector(log=False).fit(np.log(X)).decision_function(np.log(new))
    np.testing.assert_allclose(plain, logs, rtol=1e-9)


def test_module_equals_estimator_and_seeds_reproduce():
    blocks, new = network_like(200, 0), network_like(40, 1)
    detector = UncertaintyDetector().fit(blocks)
    module, scores = detector.to_module(), detector.decision_function(new)
    tensors = {name: torch.tensor(value) for name, value in new.items()}
    np.testing.assert_array_equal(module(tensors).numpy(), scores)
    np.testing.assert_array_equal(clone(detector).fit(blocks).decision_function(new), scores)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(detector)).decision_function(new), scores)
    assert (UncertaintyDetector(random_state=1).fit(blocks).decision_function(new) != scores).any()
    assert module.half().scores.energy.rows.mean.dtype == torch.float64  # stays exact inside a half network


def test_tensors_and_float32_are_accepted():
    X = torch.tensor(network_like(100, 0)["gradients"], dtype=torch.float32, requires_grad=True)
    assert UncertaintyDetector(folds=2).fit(X).decision_function(X).shape == (100,)


def test_arrays_that_run_backwards_are_accepted():
    X = network_like(100, 0)["gradients"]
    detector = UncertaintyDetector(folds=2).fit(X)
    np.testing.assert_array_equal(detector.decision_function(X[::-1])[::-1], detector.decision_function(X))
    for view, new in ((X[::-1], X), ({"logits": X[:, ::-1]}, {"logits": X})):
        expected = detector.fit(copy.deepcopy(view)).decision_function(new)
        np.testing.assert_array_equal(detector.fit(view).decision_function(new), expected)


def test_evidence_names_every_source_and_adds_up():
    both = joined(network_like(100, 0), network_like(100, 1, 2.0))
    detector = UncertaintyDetector(folds=2).fit(both, np.repeat([0, 1], 100))
    evidence = detector.explain(both)
    assert set(evidence) == {*both, "challenges"}
    assert all((values >= 0).all() for values in evidence.values())
    order = np.argsort(sum(evidence.values()))
    assert (np.diff(detector.decision_function(both)[order]) >= -1e-9).all()


def test_model_selection_uses_auroc():
    X = np.concatenate([network_like(100, 0)["gradients"], network_like(100, 1, 2.0)["gradients"]])
    y = np.repeat([0, 1], 100)
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    assert cross_val_score(UncertaintyDetector(folds=2), X, y, cv=folds).mean() > 0.9


def test_score_refuses_labels_that_fit_did_not_see():
    X, y = network_like(60, 0)["gradients"], np.tile([0, 1], 30)
    detector = UncertaintyDetector(folds=2).fit(X, y)
    assert detector.score(X, y > 0) == detector.score(X, y)
    # With scikit-learn's -1 for what is odd, 1 is what is clean.
    with pytest.raises(ValueError, match=r"y must hold labels of fit, \[0, 1\]; it held \[-1  1\]"):
        detector.score(X, 1 - 2 * y)


GOOD = network_like(60, 0)
BAD = {
    "NaN": ({"logits": np.full((60, 5), np.nan)}, None, "X\\['logits'\\] must be finite; it contains NaN"),
    "infinity": ({"features": np.full((60, 5), np.inf)}, None, "X\\['features'\\] must be finite"),
    "NaN in three dimensions": (np.full((60, 5, 3), np.nan), None, "X must be finite; it contains NaN"),
    "negative": (-GOOD["contrasts"], None, "squared norms, or set log=False"),
    "unknown block": ({"norms": GOOD["gradients"]}, None, "blocks named"),
    "no block": ({}, None, "blocks named"),
    "lengths": ({"logits": GOOD["logits"], "features": GOOD["features"][:5]}, None, "as many rows"),
    "rank": ({"logits": GOOD["contrasts"]}, None, "must be a non-empty array of shape \\(B, N\\)"),
    "classes": ({"logits": GOOD["logits"][:, :3], "contrasts": GOOD["contrasts"]}, None, "one entry per class"),
    "labels": (GOOD, np.zeros(5), "y must have shape \\(60,\\)"),
    "three labels": (GOOD, np.arange(60) % 3, "two labels"),
    "other labels": (GOOD, np.tile([-1, 1], 30), "scikit-learn's -1 and 1"),
    "words for labels": (GOOD, np.tile(["attack", "clean"], 30), "y must be numeric"),
    "a label that is none": (GOOD, np.tile([0, None], 30), "y must be finite"),
    "one challenging class": (GOOD, np.ones(60), "two labels"),
    "few": (GOOD, np.repeat([0, 1], [3, 57]), "at least 4 in-distribution"),
}
test_bad_arguments = refused(
    {name: (partial(UncertaintyDetector().fit, X, y), ValueError, words) for name, (X, y, words) in BAD.items()}
)


def test_kinds_may_be_names_and_numbers():
    detector = UncertaintyDetector().fit(GOOD, np.tile([0, 1], 30), kinds=[None, "a", None, 3] * 15)
    assert set(detector.module_.classifier_blocks()) == set(GOOD)
    with pytest.warns(UserWarning, match="column-vector y was passed"):
        column = UncertaintyDetector().fit(GOOD, np.tile([[0], [1]], (30, 1)))
    np.testing.assert_array_equal(column.classes_, [0, 1])
