"""Formulas of published detectors, against independent code in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("pytorch_ood")

from bench.detection import methods_images, methods_labelled, methods_ours, methods_outputs
from bench.detection.experiment import NotRun
from bench.detection.registry import METHODS, Protocol

B, N, D = 12, 5, 7


def _seen(h: Tensor, layer: nn.Linear, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(h=h, logits=layer(h), **more)


@pytest.fixture
def fit() -> SimpleNamespace:
    torch.manual_seed(0)
    layer = nn.Linear(D, N).requires_grad_(False)
    h = torch.rand(60, D)
    clean = _seen(h, layer, spread=torch.rand(60, D), stages=[torch.rand(60, 4), torch.rand(60, 3), h])
    experiment = SimpleNamespace(few=False, draw=0)
    return SimpleNamespace(clean=clean, layer=layer, labels=torch.arange(60) % N, experiment=experiment)


def test_grad_trust_is_its_authors() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(D, N).double()
    for scale in (1.0, 100.0):
        h = scale * torch.rand(B, D, dtype=torch.float64)
        ratios = []
        for sample in h:
            loss = nn.MSELoss()(layer(sample[None]), torch.full((1, N), 1 / N, dtype=torch.float64))
            (gradient,) = torch.autograd.grad(loss, layer.weight)
            energy = gradient.square().var(1)
            ratios.append(energy.max() / energy.mean())
        found = methods_outputs.grad_trust(layer(h).detach())
        torch.testing.assert_close(found, torch.stack(ratios), rtol=1e-9, atol=0)


def test_p_norm_ignores_shift_and_scale(fit: SimpleNamespace) -> None:
    score = METHODS["pNormSoftmax"].fit(fit)
    z = torch.randn(B, N, dtype=torch.float64)
    moved = score(SimpleNamespace(logits=3 * z + 7))
    torch.testing.assert_close(score(SimpleNamespace(logits=z)), moved)
    centred = z - z.mean(1, keepdim=True)
    torch.testing.assert_close(moved, -centred.amax(1) / (centred.abs() ** 5).sum(1) ** 0.2)


def _ras(fit: SimpleNamespace, seen: SimpleNamespace) -> list[Tensor]:
    """The clean profile in the order of the sample."""
    profile, expected = fit.clean.h.sort(1).values.mean(0), []
    for row in seen.h:
        shifted = torch.empty(D)
        for rank, place in enumerate(sorted(range(D), key=lambda i, row=row: float(row[i]))):
            shifted[place] = profile[rank]
        expected.append(-fit.layer(shifted).logsumexp(0))
    return expected


def _catalyst(fit: SimpleNamespace, seen: SimpleNamespace) -> list[Tensor]:
    """Energy times capped deviations."""
    cap = fit.clean.spread.flatten()[::7].quantile(0.9)
    pairs = zip(seen.logits, seen.spread, strict=True)
    return [-z.exp().sum().log() * spread.minimum(cap).mean() for z, spread in pairs]


def _knn(fit: SimpleNamespace, seen: SimpleNamespace) -> list[Tensor]:
    """The distance to the 50th neighbour."""
    distance = (F.normalize(seen.h, dim=1)[:, None] - F.normalize(fit.clean.h, dim=1)[None]).norm(dim=2)
    return list(distance.sort(1).values[:, 49])


def _grad_norm(fit: SimpleNamespace, seen: SimpleNamespace) -> list[Tensor]:
    """Minus the sum of the last layer's absolute gradients for the uniform target."""
    weight, target = fit.layer.weight.clone().requires_grad_(), torch.full((N,), 1 / N)
    losses = [F.cross_entropy(F.linear(row, weight, fit.layer.bias), target) for row in seen.h]
    return [-torch.autograd.grad(loss, weight)[0].abs().sum() for loss in losses]


@pytest.mark.parametrize(
    ("name", "formula"), [("RAS", _ras), ("Catalyst", _catalyst), ("KNN", _knn), ("GradNorm", _grad_norm)]
)
def test_a_score_is_its_formula(name: str, formula: Any, fit: SimpleNamespace) -> None:
    seen = _seen(torch.rand(B, D), fit.layer, spread=2 * torch.rand(B, D))
    expected = torch.stack(formula(fit, seen))
    torch.testing.assert_close(METHODS[name].fit(fit)(seen), expected, rtol=1e-5, atol=1e-5)


def test_normalised_features_forget_their_length(fit: SimpleNamespace) -> None:
    h = torch.rand(B, D)
    for name in ("Mahalanobis++", "KNN"):
        score = METHODS[name].fit(fit)
        torch.testing.assert_close(score(_seen(h, fit.layer)), score(_seen(9 * h, fit.layer)))
    plain = METHODS["Mahalanobis"].fit(fit)
    assert not torch.allclose(plain(_seen(h, fit.layer)), plain(_seen(9 * h, fit.layer)))


def test_weiper_is_a_mean_of_probabilities(fit: SimpleNamespace) -> None:
    found = METHODS["WeiPer"].fit(fit)(_seen(torch.rand(B, D), fit.layer))
    assert ((found >= -1) & (found <= -1 / N)).all()
    assert found.std() > 0


def test_recovery_finds_a_foreign_stage(fit: SimpleNamespace) -> None:
    score = METHODS["recovery testing"].fit(fit)
    usual = SimpleNamespace(stages=fit.clean.stages)
    moved = SimpleNamespace(stages=[fit.clean.stages[0] + 5, *fit.clean.stages[1:]])
    assert score(moved).median() > score(usual).median()


def test_classes_of_one_image_are_not_run(fit: SimpleNamespace) -> None:
    class Few(SimpleNamespace):
        @property
        def labels(self) -> Tensor:
            raise NotRun("needs several images of every class")

    few = Few(**{k: v for k, v in vars(fit).items() if k != "labels"})
    for name in ("SHE", "RMD", "GMM"):
        with pytest.raises(NotRun, match="every class"):
            METHODS[name].fit(few)
    # One Gaussian with shrinkage needs no classes.
    assert METHODS["Mahalanobis"].fit(few)(_seen(torch.rand(B, D), fit.layer)).shape == (B,)


def test_every_method_is_described() -> None:
    assert methods_ours.SCORES
    assert all(name in METHODS for name in methods_ours.SCORES)
    for method in METHODS.values():
        assert 2000 < method.year < 2100
        assert method.paper
        assert method.protocol in Protocol


def test_sirc_orders_as_its_formula(fit: SimpleNamespace) -> None:
    seen = _seen(2 * torch.rand(B, D), fit.layer)
    norms = fit.clean.h.abs().sum(1).double()
    a, b = norms.mean() - 3 * norms.std(), 1 / norms.std()
    softmax = seen.logits.double().softmax(1).amax(1)
    plain = (1 - softmax) * (1 + torch.exp(-b * (seen.h.abs().sum(1).double() - a)))
    torch.testing.assert_close(METHODS["SIRC"].fit(fit)(seen).exp(), plain, rtol=1e-12, atol=0)


def test_ctm_is_the_cosine_to_the_nearest_class(fit: SimpleNamespace) -> None:
    seen = _seen(torch.rand(B, D), fit.layer)
    means = [fit.clean.h[fit.labels == k].mean(0) for k in range(N)]
    plain = [-max(float(F.cosine_similarity(h, mean, dim=0)) for mean in means) for h in seen.h]
    torch.testing.assert_close(METHODS["CTM"].fit(fit)(seen), torch.tensor(plain))


def test_kpca_reconstruction_keeps_what_the_clean_components_span(fit: SimpleNamespace) -> None:
    score = METHODS["KPCA reconstruction"].fit(fit)
    clean, far = score(fit.clean), score(_seen(-torch.rand(B, D), fit.layer))
    # phi has a mean square of one, so what is outside a fifth of the clean variance is at most that.
    assert float(clean.square().mean()) < 0.2
    assert float(far.mean()) > float(clean.mean())
    scaled = score(_seen(3 * fit.clean.h, fit.layer))
    torch.testing.assert_close(scaled, clean, rtol=1e-4, atol=1e-5)


def test_pull_of_grood_is_a_gradient() -> None:
    torch.manual_seed(0)
    h, prototypes = torch.rand(B, D).double(), torch.rand(N + 1, D).double().requires_grad_()
    losses = F.cross_entropy(-(h[:, None] - prototypes).norm(dim=2), torch.arange(B) % N, reduction="none")
    expected = [torch.autograd.grad(loss, prototypes, retain_graph=True)[0][-1] for loss in losses]
    found = methods_images.pull(h, prototypes.detach())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_the_local_dimension_is_that_of_the_radii() -> None:
    """Radii that grow as a power of the rank, ``r_i = i**(1/d)``, have a closed form."""
    ranks = torch.arange(1, 21, dtype=torch.float64)
    radii = torch.stack([ranks ** (1 / d) for d in (2, 5)])
    expected = -1 / (ranks.log() - ranks[-1].log()).mean()
    found = methods_labelled.local_dimension(radii)
    torch.testing.assert_close(found, torch.stack([2 * expected, 5 * expected]), rtol=1e-12, atol=0)


def test_distances_under_a_shared_covariance() -> None:
    torch.manual_seed(0)
    values, labels, others = torch.randn(40, 3).double(), torch.arange(40) % 4, torch.randn(6, 3).double()
    means = [values[labels == k].mean(0) for k in range(4)]
    shared = sum((values[labels == k] - m).T @ (values[labels == k] - m) for k, m in enumerate(means)) / 40
    expected = [min(float((x - m) @ torch.linalg.solve(shared, x - m)) for m in means) for x in others]
    found = methods_labelled.distances(values, labels, others)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
