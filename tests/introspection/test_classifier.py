import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastgrad
from fastgrad import IntrospectiveClassifier, metrics
from fastgrad.introspection.network import GAINS, mean_and_scale, new_layers
from fastgrad.losses import LOSSES


@parametrize_with_checks([IntrospectiveClassifier()])
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


@pytest.mark.parametrize("activation", GAINS)
def test_layers_start_at_the_scale_of_their_activation(activation):
    first, _, second, _ = new_layers([200, 300, 100], activation, 0)
    for weight, gain in ((first, 1.0), (second, GAINS[activation])):
        assert float(weight.abs().max()) == pytest.approx(gain * (6 / sum(weight.shape)) ** 0.5, rel=1e-3)


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
    assert network.options["activation"] == "sigmoid"


def test_seeds_reproduce():
    features, logits, labels = problem(200, 0)
    R = {"features": features, "logits": logits}
    first, again, other = (
        IntrospectiveClassifier(max_epochs=3, hidden=(8,), random_state=seed, batch_size=size).fit(R, labels)
        for seed, size in ((0, 64), (0, np.int64(64)), (1, 64))
    )
    np.testing.assert_array_equal(first.predict_proba(R), again.predict_proba(R))
    assert (first.predict_proba(R) != other.predict_proba(R)).any()


def test_stops_early_on_held_out_data():
    rng = np.random.default_rng(0)
    noise, labels = rng.normal(size=(400, 8)), rng.integers(0, 2, 400)
    classifier = IntrospectiveClassifier(hidden=(64,), learning_rate=0.01, patience=3, max_epochs=200)
    classifier.fit(noise, labels)
    best = int(np.argmin(classifier.history_))
    assert classifier.n_iter_ < 200
    assert classifier.n_iter_ - best - 1 <= 2 * classifier.patience  # small gains do not count as progress
    # Of fewer than twenty held-out samples nobody asks when to stop: all are trained on.
    few = [classifier.set_params(validation_fraction=f).fit(noise[:190], labels[:190]).history_ for f in (0.1, 0)]
    assert few[0] == few[1]


def test_calibration_on_new_samples():
    """Many epochs on noisy labels make H too sure of itself; its temperature takes that back."""

    def noisy(count, seed):
        features, logits, labels = problem(count, seed)
        rng = np.random.default_rng(seed)
        swapped = rng.random(count) < 0.3
        labels = np.where(swapped, rng.integers(0, 4, count), labels)
        return {"features": features, "logits": logits}, np.array(list("dcba"))[labels]

    classifier = IntrospectiveClassifier(
        hidden=(64,), activation="relu", learning_rate=0.01, validation_fraction=0.0
    ).fit(*noisy(400, 0))
    R, labels = noisy(2000, 1)
    before, sure = classifier.predict(R), classifier.predict_proba(R)
    assert classifier.temperature_ == 1
    codes = np.searchsorted(classifier.classes_, labels)
    assert classifier.calibrate(*noisy(500, 2)) is classifier
    found = classifier.temperature_
    assert found > 1.5
    # An earlier temperature does not count.
    assert classifier.calibrate(*noisy(500, 2)).temperature_ == pytest.approx(found, rel=1e-6)
    np.testing.assert_array_equal(classifier.predict(R), before)
    assert log_loss(codes, classifier.predict_proba(R)) < log_loss(codes, sure)
    assert metrics.ece(classifier.predict_proba(R), codes) < metrics.ece(sure, codes)
    # The temperature is part of the network's last layer: whoever runs the module has it.
    tensors = (torch.tensor(R["features"]), torch.tensor(R["logits"]))
    np.testing.assert_allclose(classifier.to_module()(*tensors).softmax(-1), classifier.predict_proba(R), rtol=1e-12)
    # A second calibration on the same samples changes nothing but what the prior of one sample does.
    first = classifier.temperature_
    assert classifier.calibrate(*noisy(500, 2)).temperature_ == pytest.approx(first, rel=0.01)
    with pytest.raises(ValueError, match="y must hold labels of fit"):
        classifier.calibrate(R, np.full(2000, "z"))


def test_row_moments_need_no_rows(monkeypatch):
    monkeypatch.setattr("fastgrad.introspection.network.CHUNK", 30)
    features, logits, _ = (torch.tensor(part) for part in problem(100, 0))
    rows = fastgrad.contrast_rows(features, logits).flatten(1)
    mean, scale = mean_and_scale((features, logits), "mse")
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scale, rows.std(0, correction=0), rtol=1e-8, atol=1e-8)


FEATURES, LOGITS, LABELS = problem(40, 0)
BAD = {
    "no labels": (FEATURES, None, "requires y"),
    "NaN": (np.full((4, 2, 3), np.nan), np.arange(4) % 2, "R must be finite"),
    "NaN pairs": ({"features": FEATURES * np.nan, "logits": LOGITS}, LABELS, r"R\['features'\] must be finite"),
    "one of the pair": ({"features": FEATURES}, LABELS, "'features' and 'logits'"),
    "other names": ({"h": FEATURES}, LABELS, "R must have the entries 'features' and 'logits'; it had .*'h'"),
    "lengths": ({"features": FEATURES, "logits": LOGITS[:3]}, LABELS, "shapes"),
    "labels": (FEATURES, LABELS[:5], "y must have one label per row"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    R, y, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        IntrospectiveClassifier().fit(R, y)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation", "sine"), ("loss", "hinge"), ("batch_size", 0), ("hidden", (0,)), ("validation_fraction", 1.0),
        ("max_epochs", 1.5), ("hidden", 30), ("learning_rate", None), ("validation_fraction", "a"),
        ("device", "gpu"), ("device", None), ("device", "meta"), ("learning_rate", -1.0), ("weight_decay", -1),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must"):
        IntrospectiveClassifier(**{name: value}).fit(FEATURES, LABELS)


@pytest.mark.parametrize("R", [1e200 * FEATURES, {"features": 1e30 * FEATURES, "logits": 1e10 * LOGITS}])
def test_what_float32_cannot_train_on_is_refused(R):
    with pytest.raises(ValueError, match="R must hold numbers that float32 can train on; the loss was never finite"):
        IntrospectiveClassifier(hidden=(4,), max_epochs=2).fit(R, LABELS)


@pytest.mark.parametrize("groups", [None, np.zeros(len(LABELS), int)])
def test_some_source_is_trained_on_whatever_the_share(groups):
    """Of forty samples .99 are all of them, and of one source so is .6."""
    classifier = IntrospectiveClassifier(hidden=(4,), max_epochs=2, validation_fraction=0.99 if groups is None else 0.6)
    assert np.isfinite(classifier.fit(FEATURES, LABELS, groups=groups).history_).all()


def test_other_shapes_than_in_fit_are_refused():
    fitted = IntrospectiveClassifier(max_epochs=1).fit({"features": FEATURES, "logits": LOGITS}, LABELS)
    with pytest.raises(ValueError, match="shape of fit"):
        fitted.predict({"features": FEATURES[:, :3], "logits": LOGITS})


def test_samples_of_one_source_decide_together_when_to_stop():
    """Copies of held-out samples among those trained on would call every epoch a gain."""
    rng = np.random.default_rng(0)
    noise, labels = np.tile(rng.normal(size=(100, 8)), (4, 1)), np.tile(rng.integers(0, 2, 100), 4)
    groups = np.tile(np.arange(100), 4)

    def epochs(**kwargs):
        classifier = IntrospectiveClassifier(hidden=(64,), learning_rate=0.03, patience=20, max_epochs=80)
        return classifier.fit(noise, labels, **kwargs).n_iter_

    assert epochs(groups=groups) < 40 < epochs()
    assert epochs(groups=np.full(400, -1)) == epochs()
    with pytest.raises(ValueError, match="groups must be integers of shape"):
        epochs(groups=groups[1:])
