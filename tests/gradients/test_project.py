"""grad_project against its linear map, written out as a matrix, of a float64 gradient of each sample alone."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import doubled, sample_gradients
from small_nets import SMALL, Net, build, waves
from torch import Tensor, nn

import fastgrad
from fastgrad.engine import products
from fastgrad.gradients import project
from fastgrad.gradients.project import Places

# PyTorch says so once a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

#: Relative to the norm of a sample's gradient: some sums of thousands of roundings.
ALLOWED = 100 * torch.finfo(torch.float32).eps


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients ``(B, numel)`` of each parameter in float64."""
    model = copy.deepcopy(model).double()
    rows = sample_gradients((waves(model(row)).sum() for row in doubled(x).split(1)), list(model.parameters()))
    return [torch.stack(each).reshape(len(x), -1) for each in zip(*rows, strict=True)]


def matrix(name: str, p: Tensor, size: int, seed: int = 0) -> Tensor:
    """The map ``(numel, K)`` of a parameter, number by number."""
    shape = tuple(p.shape)
    places = Places.of(f"{seed} {name} {shape}", shape, size, p.device)
    made = torch.zeros(p.numel(), size, dtype=torch.float64)
    for n in range(p.numel()):
        r, c = divmod(n, len(places.column))
        made[n, (places.row[r] + places.column[c]) % size] = float(places.row_sign[r] * places.column_sign[c])
    return made


def expected(model: nn.Module, g: list[Tensor], size: int) -> Tensor:
    named = model.named_parameters()
    return sum((own @ matrix(name, p, size) for (name, p), own in zip(named, g, strict=True)), torch.zeros(()))


def rows(model: nn.Module, x: Tensor, size: int, **options: Any) -> Tensor:
    with fastgrad.record(model):
        return fastgrad.grad_project(waves(model(x)), list(model.parameters()), size, **options)


@pytest.mark.parametrize(("route", "run"), [(True, 1), (False, 1), (False, 1000)], ids=["products", "runs", "places"])
@pytest.mark.parametrize("chunk", [None, 200], ids=["whole", "parts"])
@pytest.mark.parametrize("size", [1, 7, 64], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_rows_are_a_linear_map_of_gradients(
    name: str, size: int, chunk: int | None, route: bool, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project, "_transforms", lambda *_: route)
    monkeypatch.setattr(project, "RUN", run)
    for module in (products, project):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk or module.CHUNK_BYTES)
    model, x = build(name)
    g = gradients(model, x)
    found = rows(model, x, size)
    assert found.dtype == torch.float32
    assert found.shape == (len(x), size)
    # In a single place all numbers add up, so roundings are relative to sums of absolute values.
    scale = sum(own.abs().sum(1) for own in g)
    assert ((found.double() - expected(model, g, size)).abs() <= ALLOWED * scale[:, None]).all()


@pytest.mark.parametrize("name", ["tied", "reused, positions", "conv", "alone", "attention"])
def test_float64(name: str) -> None:
    model, x = build(name)
    model, x = model.double(), doubled(x)
    found, g = rows(model, x, 50), gradients(model, x)
    assert found.dtype == torch.float64
    assert (found - expected(model, g, 50)).abs().max() <= 1e-12 * torch.cat(g, 1).norm(dim=1).max()


@pytest.mark.parametrize("name", ["linear", "tied", "conv", "groups", "alone", "norms"])
def test_normalised_rows_and_frozen_parameters(name: str) -> None:
    model, x = build(name)
    g = gradients(model, x)
    next(model.parameters()).requires_grad_(False)
    found, plain = rows(model, x, 64, normalize=True), rows(model, x, 64)
    norms = torch.cat(g, 1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.double() * norms, plain.double(), rtol=1e-4, atol=1e-4 * float(norms.max()))


@pytest.mark.parametrize("name", ["positions", "tied", "conv", "groups", "alone"])
def test_rows_are_the_same_in_any_batch(name: str) -> None:
    model, x = build(name)
    with torch.no_grad():
        x = torch.cat([x, x.flip(0)])
    found: list[Tensor] = []

    def work() -> None:
        torch.manual_seed(7)
        found.append(rows(model, x, 40))

    whole = rows(model, x, 40)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    close = {"rtol": 0, "atol": float(ALLOWED * torch.cat(gradients(model, x), 1).abs().sum(1).max())}
    torch.testing.assert_close(found[0], whole, **close)
    torch.testing.assert_close(rows(model, x.flip(0), 40).flip(0), whole, **close)
    torch.testing.assert_close(torch.cat([rows(model, own, 40) for own in x.split(1)]), whole, **close)


def test_rows_of_parameters_add_up() -> None:
    model, x = build("conv")
    with fastgrad.record(model):
        losses = waves(model(x))
        each = [fastgrad.grad_project(losses, p, 32, retain_graph=True) for p in model.parameters()]
        whole = fastgrad.grad_project(losses, list(model.parameters())[::-1], 32, retain_graph=True)
        other = fastgrad.grad_project(losses, model, 32, seed=1)
    torch.testing.assert_close(sum(each), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    assert (other - whole).abs().max() > 0.1 * whole.abs().max()


def test_a_small_parameter_is_exact() -> None:
    model, x = build("positions")
    with fastgrad.record(model):
        losses = waves(model(x))
        found = fastgrad.grad_project(losses, model[0].weight, 30, retain_graph=True)
        gram = fastgrad.grad_gram(losses, model[0].weight)
    torch.testing.assert_close(found @ found.mT, gram, rtol=1e-4, atol=1e-4 * float(gram.max()))


@pytest.mark.parametrize("name", ["linear", "positions", "conv", "tied", "layer norm"])
def test_inner_products_are_unbiased(name: str) -> None:
    """Over 400 seeds, the mean lies within five standard errors, and the spread is what the docstring says."""
    model, x = build(name)
    g = torch.cat(gradients(model, x), 1)
    exact, scale, size = g @ g.mT, g.norm(dim=1)[:, None] * g.norm(dim=1), 16
    found = torch.stack([(row := rows(model, x, size, seed=seed).double()) @ row.mT for seed in range(400)])
    assert ((found.mean(0) - exact).abs() <= 5 * found.std(0) / 20 + 1e-6 * scale).all()
    assert (found.std(0) <= 1.5 * scale * (2 / size) ** 0.5).all()


@pytest.mark.parametrize("shape", [(9, 4), (40, 3), (3, 40), (24, 6), (17, 9), (400, 1), (5, 2, 7)], ids=str)
def test_estimates_spread_as_promised(shape: tuple[int, ...]) -> None:
    """The worst for places in runs are rows that are alike, whose numbers could meet column by column."""
    size, found = 31, []
    g = torch.ones(shape).flatten(1) / torch.Size(shape).numel() ** 0.5
    for seed in range(4000):
        places = Places.of(f"{seed}", shape, size, g.device)
        row = torch.zeros(size)
        at = (places.row.unsqueeze(1) + places.column) % size
        row.index_add_(0, at.flatten(), (g * places.row_sign.unsqueeze(1) * places.column_sign).flatten())
        found.append(float(row @ row))
    spread, mean = torch.tensor(found, dtype=torch.float64).std(), sum(found) / len(found)
    assert abs(mean - 1) <= 5 * float(spread) / len(found) ** 0.5
    # The square of a spread that is estimated from so many has an error of some per cent.
    assert spread <= 1.1 * (2 / size) ** 0.5


def test_no_samples_no_parameters_and_no_dependence() -> None:
    model, x = build("linear")
    assert rows(model, x[:0], 8).shape == (0, 8)
    net = Net(lambda net, x: net.used(x), used=nn.Linear(6, 2), unused=nn.Linear(6, 2))
    with fastgrad.record(net):
        losses = waves(net(x))
        assert not fastgrad.grad_project(losses, net.unused, 8, normalize=True, retain_graph=True).any()
        assert fastgrad.grad_project(losses, net, 8).any()


def test_refusals() -> None:
    model, x = build("linear")
    with pytest.raises(RuntimeError, match="grad_project must be called inside record"):
        fastgrad.grad_project(x.sum(1), model, 8)
    with fastgrad.record(model):
        losses = waves(model(x))
        for options, error, message in (
            ({"size": 0}, ValueError, "size must be an integer of at least 1; it was 0"),
            ({"size": 2.0}, ValueError, "size must be an integer"),
            ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
            ({"normalize": 1}, TypeError, "normalize must be True or False"),
        ):
            with pytest.raises(error, match=message):
                fastgrad.grad_project(losses, model, **{"size": 8, **options})
        with pytest.raises(ValueError, match="parameters of the recorded model"):
            fastgrad.grad_project(losses, nn.Linear(2, 2), 8)
        with pytest.raises(ValueError, match="reduction"):
            fastgrad.grad_project(F.mse_loss(model(x), torch.zeros(len(x), 3)), model, 8)
