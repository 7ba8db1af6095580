"""The loss table against 80-digit arithmetic and against float64 autograd."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad import losses

EPS = torch.finfo(torch.float32).eps
SMALLEST = torch.finfo(torch.float32).tiny
MARGINS = (0, 1, 5, 10, 20, 30, 40)


def exponent_error(margin: float) -> float:
    """Relative error of ``exp(z_j - z_i)``: the difference is rounded once, and what it loses the exponential keeps.

    Half an ulp of ``margin + 8`` (the spread of the other logits), plus two ulps for the exponential itself.
    """
    return (margin + 8) * EPS / 2 + 2 * EPS


def budget(loss: str, margin: float, N: int) -> float:
    """Error budget of one squared norm: squares double an error; a sum of N terms adds at most log2(N) roundings."""
    power = {"cross_entropy": 2, "bce": 2, "mse": 2, "brier": 4}[loss]
    return power * exponent_error(margin) + (8 + math.log2(N)) * EPS


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("margin", MARGINS)
def test_every_contrast_is_relatively_accurate(loss: str, margin: int) -> None:
    z = oracles.confident_logits(4, 12, margin, torch.Generator().manual_seed(torch.seed() % 2**31))
    exact = oracles.contrast_matrix(z, loss)
    got = losses.contrast_norms(z, loss=loss).double()
    # Below the smallest normal number float32 has fewer digits: there the logarithm is the answer.
    normal = exact > SMALLEST
    error = ((got - exact).abs() / exact)[normal]
    assert normal.float().mean() > 0.9 or loss == "brier"
    assert error.max() <= min(budget(loss, margin, 12), 1e-5)

    log_exact = oracles.contrast_matrix(z, loss, log=True)
    log_got = losses.contrast_norms(z, loss=loss, log=True).double()
    # A relative error of the value is an absolute one of its logarithm, which then is rounded itself.
    allowed = budget(loss, margin, 12) + 2 * EPS * log_exact.abs()
    assert ((log_got - log_exact).abs() <= allowed).all()


def test_float32_autograd_has_no_correct_digit_at_margin_20() -> None:
    z = oracles.confident_logits(64, 12, 20, torch.Generator().manual_seed(1))
    k = z.argmax(-1)
    leaf = z.clone().requires_grad_()
    (delta,) = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, k, reduction="sum"), leaf)
    exact = oracles.contrast_matrix(z, "cross_entropy").gather(1, k[:, None])[:, 0]
    autograd_error = (delta.double().square().sum(-1) - exact).abs() / exact
    ours = losses.target_norms(z, k, loss="cross_entropy").double()
    assert autograd_error.median() > 0.1
    assert ((ours - exact).abs() / exact).max() <= 1e-5


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("N", [1, 2, 7])
def test_deltas_equal_float64_autograd(loss: str, N: int) -> None:
    z = torch.randn(5, N, dtype=torch.float64) * 2
    every = losses.contrast_delta(z, loss=loss)
    labels = {"ones": torch.ones_like(z), "uniform": torch.full_like(z, 1 / N), "soft": torch.rand_like(z)}
    labels |= {f"contrast {k}": torch.eye(N, dtype=z.dtype)[k].expand_as(z) for k in range(N)}
    for name, y in labels.items():
        leaf = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(oracles.loss_value(leaf, y, loss).sum(), leaf)
        if name.startswith("contrast"):
            k = int(name.split()[1])
            got = every[:, k]
            torch.testing.assert_close(losses.contrast_diagonal(z, loss=loss)[:, k], expected[:, k])
            by_index = losses.delta(z, torch.full((5,), k), loss=loss)
            torch.testing.assert_close(by_index, expected)
        else:
            got = losses.delta(z, y if name == "soft" else name, loss=loss)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
        mean = losses.delta(z, y, loss=loss, reduction="mean")
        torch.testing.assert_close(mean, expected / N, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("target", ["ones", "uniform", "predicted", "indices", "soft", "one hot", "nearly one hot"])
@pytest.mark.parametrize("margin", [0, 10, 16, 20, 40])
def test_targets_are_relatively_accurate(loss: str, target: str, margin: int) -> None:
    z = oracles.confident_logits(4, 9, margin, torch.Generator().manual_seed(torch.seed() % 2**31))
    k = z.argmax(-1)
    label: str | torch.Tensor = target
    y = {"ones": torch.ones(4, 9), "uniform": torch.full((4, 9), 1 / 9, dtype=torch.float64)}.get(target)
    if target == "predicted":
        y = torch.nn.functional.one_hot(k, 9)
    elif target == "indices":
        label = torch.randint(9, (4,))
        y = torch.nn.functional.one_hot(label, 9)
    elif target == "soft":
        label = y = torch.rand(4, 9)
    elif target == "one hot":
        # From delta itself, as in a whole network; class indices have a formula of their own.
        label = y = torch.nn.functional.one_hot(k, 9).float()
    elif target == "nearly one hot":
        # Far from 1 - p_k at every margin, and near enough to 1 for y_k - y_j to lose it.
        label = y = torch.nn.functional.one_hot(k, 9) * (1 - 1e-6) + torch.nn.functional.one_hot((k + 1) % 9, 9) * 1e-6
    assert y is not None
    pairs = zip(z.double().tolist(), y.double().tolist(), strict=True)
    exact = [oracles.target_norms(row, goal, loss) for row, goal in pairs]
    log_exact = torch.tensor([oracles.logarithm(value) for value in exact], dtype=torch.float64)
    log_got = losses.target_norms(z, label, loss=loss, log=True).double()
    # delta subtracts label and probability: where they are close, rounding the operands is amplified by their ratio
    # to the difference. A label drawn at random and logits of unit spread keep that ratio below 64.
    allowed = 64 * budget(loss, margin, 9) + 2 * EPS * log_exact.abs()
    assert ((log_got - log_exact).abs() <= allowed).all()


@pytest.mark.parametrize("target", ["ones", "uniform"])
@pytest.mark.parametrize("margin", [50.0, 200.0, 1e4])
def test_logarithm_where_the_gradient_itself_underflows(target: str, margin: float) -> None:
    z = torch.tensor([0.0, margin, 0.0])
    # With q = exp(-margin) delta is (-2, 4, -2) q, up to q^2.
    expected = torch.tensor(math.log(24) - 2 * margin)
    torch.testing.assert_close(losses.target_norms(z, target, loss="brier", log=True), expected, rtol=1e-6, atol=0)
    ones = losses.target_norms(torch.full((3,), margin), "ones", loss="bce", log=True)
    torch.testing.assert_close(ones, torch.tensor(math.log(3) - 2 * margin), rtol=1e-6, atol=0)
    assert losses.target_norms(z, z, loss="mse", log=True) == -math.inf


@pytest.mark.parametrize("target", ["ones", "uniform", "equal labels", "nearly equal labels"])
@pytest.mark.parametrize("loss", ["cross_entropy", "brier"])
def test_nearly_equal_logits_do_not_cancel(loss: str, target: str) -> None:
    z = 1e-3 * torch.randn(6, 50)
    label: str | torch.Tensor = target
    y = torch.full((6, 50), 1.0 if target == "ones" else 1 / 50, dtype=torch.float64)
    if target.endswith("labels"):
        label = y.float() if target == "equal labels" else y.float() + 1e-5 * torch.randn(6, 50)
        y = label.double()
    pairs = zip(z.double().tolist(), y.tolist(), strict=True)
    exact = torch.tensor([float(oracles.target_norms(row, goal, loss)) for row, goal in pairs])
    got = losses.target_norms(z, label, loss=loss)
    assert ((got - exact).abs() / exact).max() <= 64 * EPS


@pytest.mark.parametrize("target", ["ones", "uniform", "indices", "smoothed"])
@pytest.mark.parametrize("step", [-1.0, -0.5, 0.5, 0.8, 3.0])
def test_one_of_very_many_logits_stands_out(target: str, step: float) -> None:
    classes = 50_000
    z = torch.zeros(1, classes)
    z[0, 7] = step
    y = torch.nn.functional.one_hot(torch.tensor([7]), classes).double()
    label: str | torch.Tensor = target
    if target in ("ones", "uniform"):
        y = torch.full_like(y, 1 if target == "ones" else 1 / classes)
    else:
        label = torch.tensor([7]) if target == "indices" else (y * 0.9 + 0.1 / classes).float()
        y = y if target == "indices" else label.double()
    exact = (z.double().softmax(1) * y.sum(1, keepdim=True) - y).square().sum(1)
    got = losses.target_norms(z, label, loss="cross_entropy")
    assert ((got - exact).abs() / exact).max() <= 64 * EPS


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_ties_and_masked_classes(loss: str) -> None:
    z = torch.randn(3, 6)
    z[0, 4] = z[0, 1] = z[0].max() + 3
    if loss in ("cross_entropy", "brier", "bce"):
        z[1, 2] = -math.inf
    exact = oracles.contrast_matrix(z, loss)
    got = losses.contrast_norms(z, loss=loss).double()
    assert ((got - exact).abs() / exact.clamp(min=SMALLEST)).max() <= budget(loss, 3, 6)


@settings(deadline=None, max_examples=30)
@given(
    N=st.integers(1, 40), scale=st.floats(0, 30), seed=st.integers(0, 2**31 - 1), loss=st.sampled_from(losses.LOSSES)
)
def test_plain_and_logarithmic_agree(N: int, scale: float, seed: int, loss: str) -> None:
    z = scale * torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain = losses.contrast_norms(z, loss=loss)
    log = losses.contrast_norms(z, loss=loss, log=True)
    big = plain > 1e-250
    torch.testing.assert_close(log[big], plain[big].log(), rtol=1e-9, atol=1e-9)
    assert (plain >= 0).all()


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("log", [False, True])
def test_gradients(loss: str, log: bool) -> None:
    z = (3 * torch.randn(2, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.contrast_norms(x, loss=loss, log=log), (z,))
    assert torch.autograd.gradcheck(lambda x: losses.target_norms(x, "ones", loss=loss, log=log), (z,))


def test_an_unknown_target_is_refused() -> None:
    for loss in losses.LOSSES:
        for call in (losses.delta, losses.target_norms):
            with pytest.raises(ValueError, match=r"target must be one of 'ones', 'uniform', 'predicted'.*'best'"):
                call(torch.zeros(2, 3), "best", loss=loss)
