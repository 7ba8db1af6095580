import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as SklearnMixture
from small_nets import Net
from torch import nn

from fastgrad.challenges.attacks import gradients_reach
from fastgrad.scores.conformal import PValues
from fastgrad.scores.fitted import Fitted
from fastgrad.scores.gaussian_mixture import GaussianMixture
from fastgrad.scores.mahalanobis import Mahalanobis
from fastgrad.scores.one_class import Energy, Margin
from fastgrad.scores.rows import SMALLEST, ScoreRows

RNG = np.random.default_rng(0)


def test_mixture_scores_as_scikit_learn_does():
    rows, new = RNG.normal(size=(300, 5)), 3 * RNG.normal(size=(40, 5))
    ours = GaussianMixture.fit(torch.tensor(rows), 3)(torch.tensor(new)).numpy()
    theirs = SklearnMixture(3, reg_covar=1e-2, random_state=0, max_iter=200).fit(rows)
    # The same sums in another order: some hundred float64 roundings.
    np.testing.assert_allclose(ours, -theirs.score_samples(new), rtol=1e-12, atol=1e-12)


def test_a_mixture_of_equal_rows_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GaussianMixture.fit(torch.ones(30, 2).double(), 3)(torch.ones(2, 2)).isfinite().all()


@pytest.mark.parametrize("what", ["mixture", "attacked"])
def test_threads_that_fit_leave_the_filters_of_warnings(what, monkeypatch):
    numbers, inside, over, fit = itertools.count(), threading.Event(), threading.Event(), SklearnMixture.fit

    def together(function, *given):
        # The first begins before the second, and ends before it.
        if next(numbers) == 0:
            inside.wait(1)
        else:
            inside.set()
            over.wait(1)
        return function(*given)

    def run(_):
        if what == "mixture":
            GaussianMixture.fit(torch.tensor(RNG.normal(size=(30, 2))), 2)
        else:
            assert gradients_reach(Net(lambda net, x: together(net.layer, x.flatten(1)), layer=nn.Linear(3, 2)), image)
        over.set()

    monkeypatch.setattr(SklearnMixture, "fit", lambda self, rows: together(fit, self, rows))
    before, image = list(warnings.filters), torch.rand(1, 3, 1, 1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert warnings.filters == before


def test_energy():
    logits = torch.tensor(RNG.normal(size=(9, 4)))
    np.testing.assert_allclose(Energy()(logits), -np.log(np.exp(logits.numpy()).sum(1)), rtol=1e-12)


def test_log_probabilities_have_no_energy():
    logits = torch.randn(200, 5).log_softmax(-1).double()
    assert (Energy()(logits) == 0).all()
    assert Energy()(torch.full((1, 5), torch.nan)).isnan().all()


def test_margin():
    logits = torch.tensor(RNG.normal(size=(9, 2))).sort(descending=True).values
    margin = logits[:, 0] - logits[:, 1]
    # What float32 rounds off a logit counts as margin.
    rounding = torch.finfo(torch.float32).eps * logits[:, 0].abs() / margin
    assert ((Margin()(logits) + margin.log()).abs() <= rounding + 1e-12).all()
    equal, certain, none = Margin()(torch.tensor([[2.0, 2.0], [2.0, -np.inf], [np.nan, 0.0]]).double())
    assert np.log(1e6) < equal < 100
    assert certain == -np.inf
    assert none.isnan()


def test_margin_at_the_boundary():
    clean = torch.stack([torch.linspace(0.01, 10, 1000), torch.zeros(1000)], 1).double()
    tail = PValues.fit(Margin()(clean).unsqueeze(0), [False])
    p = tail(Margin()(torch.tensor([[1e-2, 0.0], [1e-3, 0.0], [1e-4, 0.0]]).double()).unsqueeze(0))[0].exp()
    # Clean margins are below a given one in proportion to it. The estimated tail is heavier: ten scores tell of it.
    assert (p > torch.tensor([1e-3, 1e-4, 1e-5])).all()
    assert (p < torch.tensor([5e-3, 1e-3, 2e-4])).all()


@pytest.mark.parametrize(
    ("shape", "last"), [((6, 4), ...), ((6, 4, 3), (..., -1)), ((6, 2, 4, 3), np.s_[:, -1, :, -1])]
)
def test_order_by_rank(shape, last):
    contrasts, logits = RNG.normal(size=shape), RNG.normal(size=(6, 4))
    for others, falling in (({"logits": logits}, logits), ({}, -contrasts[last])):
        blocks = {name: torch.tensor(value) for name, value in {"contrasts": contrasts, **others}.items()}
        rows = ScoreRows.fit(blocks, "contrasts", rank=True, standardise=False)
        ordered = rows(blocks)
        for b in range(6):
            order = np.argsort(-falling[b])
            expected = contrasts[b][:, order] if len(shape) == 4 else contrasts[b][order]
            assert ordered[b].tolist() == expected.ravel().tolist()
        none = {name: values[:0] for name, values in blocks.items()}
        assert rows(none).shape == (0, contrasts[0].size)


def test_rows_are_standardised_logarithms_and_zeros_stay_finite():
    norms = np.exp(RNG.normal(size=(50, 2, 3)))
    norms[0] = 0
    rows = ScoreRows.fit({"gradients": torch.tensor(norms)}, "gradients", log=True, dimensions=6)(
        {"gradients": torch.tensor(norms)}
    )
    logs = np.log(np.maximum(norms, SMALLEST)).reshape(50, 6)
    np.testing.assert_allclose(rows, (logs - logs.mean(0)) / logs.std(0), rtol=1e-10)


def test_projection_is_white_and_of_the_wanted_size():
    values = RNG.normal(size=(400, 4)) @ RNG.normal(size=(4, 20))
    rows = ScoreRows.fit({"features": torch.tensor(values)}, "features", dimensions=12)(
        {"features": torch.tensor(values)}
    )
    assert rows.shape == (400, 4)  # the data has no more directions than that
    np.testing.assert_allclose(np.cov(rows.numpy().T), np.eye(4), atol=1e-8)


def test_projection_of_a_wide_block():
    values = RNG.normal(size=(80, 10)) @ RNG.normal(size=(10, 3000)) + 0.1 * RNG.normal(size=(80, 3000))
    values[0, :50] = 1e3
    rows = ScoreRows.fit({"features": torch.tensor(values)}, "features", clip=8.0, dimensions=10)
    assert rows.projection.dtype == torch.float32
    found = rows({"features": torch.tensor(values)}).numpy()
    # Sums of 3,000 products in float32, of values up to 8.
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(found.T), np.eye(10), atol=1e-4)


def test_columns_beside_a_projection():
    values = RNG.normal(size=(400, 30))
    blocks = {"features": torch.tensor(values)}
    columns = ScoreRows.fit({"features": torch.tensor(values)}, "features")(blocks)
    components = ScoreRows.fit({"features": torch.tensor(values)}, "features", dimensions=6)(blocks)
    found = ScoreRows.fit({"features": torch.tensor(values)}, "features", dimensions=6, extra_columns=12)(blocks)
    assert found[:, :6].equal(components)
    np.testing.assert_allclose(found[:, 6:], columns[:, ::3] * np.sqrt(6 / 10), rtol=1e-12)
    np.testing.assert_allclose(found[:, 6:].square().sum(), 400 * 6, rtol=1e-12)
    # Where there is nothing to project, there is nothing beside it.
    assert ScoreRows.fit({"features": torch.tensor(values)}, "features", dimensions=30, extra_columns=12)(blocks).equal(
        columns
    )


def test_clipped_rows():
    values = RNG.normal(size=(50, 3))
    rows = ScoreRows.fit({"features": torch.tensor(values)}, "features", clip=3.0)
    new = torch.tensor([[1e9, -1e9, 0.0], [np.inf, 0, 0], [np.nan, 0, 0]])
    found = rows({"features": new})
    assert found[0, :2].tolist() == [3, -3]
    assert torch.isnan(found[1:, 0]).all()


def test_constant_columns_are_harmless():
    values = np.ones((30, 3))
    rows = ScoreRows.fit({"features": torch.tensor(values)}, "features", dimensions=2)
    assert rows({"features": torch.tensor(values)}).tolist() == [[0.0]] * 30


def test_what_was_learned_by_gradients_needs_none():
    """As a score of the user's may be, whose results become arrays."""
    learned = ScoreRows.fit({"features": torch.eye(4).double()}, "features", dimensions=2)
    learned = ScoreRows(**{**learned.options, **dict(learned.named_buffers()), "mean": nn.Parameter(learned.mean)})
    assert learned({"features": torch.eye(4).double()}).shape == (4, 2)


def test_a_name_in_files_is_that_of_one_class():
    """A class of the user's would be what a stored detector is made of in place of ours."""
    with pytest.raises(ValueError, match=r"name of its own.*scores\.mahalanobis\.Mahalanobis"):
        type("Mahalanobis", (Fitted,), {"__module__": "theirs"})
    assert Fitted.kinds["Mahalanobis"] is Mahalanobis
    for _ in range(2):  # as a cell of a notebook may be run again
        theirs = type("Theirs", (Fitted,), {"__module__": "theirs"})
    assert Fitted.kinds.pop("Theirs") is theirs
