import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from fastgrad import metrics
from fastgrad.scores.fitted import rebuild
from fastgrad.scores.temperature import Temperature


def drawn(count, seed, classes=5):
    """Calibrated logits, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
def test_finds_the_factor_that_spoiled_the_logits(factor):
    logits, labels = drawn(4000, 0)
    found = float(Temperature.fit(factor * logits, labels).temperature)
    # The variance of log T is 1 over the Fisher information, n times the mean variance of a sample's logits.
    p = logits.softmax(1)
    information = (p * logits.square()).sum() - (p * logits).sum(1).square().sum()
    assert abs(np.log(found / factor)) < 4 / float(information.sqrt())


@pytest.mark.parametrize("count", [1, 3, 50])
def test_minimises_what_it_says(count):
    logits, labels = drawn(count, count)
    z, y = 3 * logits.numpy(), labels.numpy()

    def objective(log_inverse):
        b = np.exp(log_inverse)
        nll = np.logaddexp.reduce(b * z, 1) - b * z[np.arange(count), y]
        return nll.sum() + b - 1 - np.log(b)

    best = minimize_scalar(objective, bounds=(-7, 7), method="bounded", options={"xatol": 1e-10}).x
    # A minimum is known to the root of eps only.
    assert float(Temperature.fit(torch.tensor(z), labels).temperature) == pytest.approx(np.exp(-best), rel=1e-6)


def test_a_class_that_is_masked_out_changes_nothing():
    logits, labels = drawn(300, 2)
    masked = torch.nn.functional.pad(3 * logits, (0, 1), value=-torch.inf)
    assert float(Temperature.fit(masked, labels).temperature) == float(Temperature.fit(3 * logits, labels).temperature)


def test_extremes_stay_finite():
    logits, labels = drawn(500, 1)
    for values in (
        10 * torch.eye(5, dtype=torch.float64)[labels],  # every prediction is right
        1e3 * torch.eye(5, dtype=torch.float64)[(labels + 1) % 5],  # every prediction is wrong
        torch.zeros_like(logits),
        logits[:, torch.randperm(5, generator=torch.Generator().manual_seed(0))] * 1e-6,
        logits * 1e4,
    ):
        score = Temperature.fit(values, labels)
        assert 1e-3 <= float(score.temperature) <= 1e3 * (1 + 1e-9)
        assert torch.isfinite(score(values).softmax(1)).all()
    right = Temperature.fit(10 * torch.eye(5, dtype=torch.float64)[labels], labels)
    assert 0.5 < float(right.temperature) <= 1
    assert float(Temperature.fit(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)).temperature) == pytest.approx(1)


def test_calibrates_and_keeps_the_prediction_and_the_dtype():
    logits, labels = drawn(4000, 2)
    sharp = 4 * logits
    score = Temperature.fit(sharp[:2000], labels[:2000])
    before, after = (metrics.ece(z[2000:].softmax(1), labels[2000:]) for z in (sharp, score(sharp)))
    assert after < 0.04 < 0.1 < before
    assert torch.equal(score(sharp).argmax(1), sharp.argmax(1))
    assert score(sharp.half()).dtype == torch.float16
    stored = rebuild(score.spec(), score.state_dict())
    assert torch.equal(stored(sharp), score(sharp))
    with pytest.raises(ValueError, match="unknown part 'Later'"):
        rebuild({"kind": "Later"}, {})
