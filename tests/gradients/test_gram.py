"""grad_gram and grad_square_sum against a float64 gradient of each sample alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import doubled, sample_gradients
from small_nets import SMALL, build, waves
from torch import Tensor, nn

import fastgrad
from fastgrad.engine import backward, products

# PyTorch says so once a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

#: Relative to the product of two norms: some sums of thousands of roundings.
ALLOWED = 100 * torch.finfo(torch.float32).eps
Losses = Callable[[Tensor], Tensor]


def truth(model: nn.Module, x: Tensor, losses: Losses = waves) -> list[Tensor]:
    """Gradients ``(B, numel)`` of each parameter in float64."""
    model = copy.deepcopy(model).double()
    rows = sample_gradients((losses(model(row)).sum() for row in doubled(x).split(1)), list(model.parameters()))
    return [torch.stack(each).reshape(len(x), -1) for each in zip(*rows, strict=True)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return waves(model(x)).sum()


def assert_grams(found: Tensor, g: list[Tensor], h: list[Tensor] | None = None, allowed: float = ALLOWED) -> None:
    left, right = torch.cat(g, 1), torch.cat(h or g, 1)
    scale = left.norm(dim=1)[:, None] * right.norm(dim=1)
    assert found.shape == scale.shape
    assert ((found.double() - left @ right.mT).abs() <= allowed * scale + 1e-300).all()


def grams(model: nn.Module, x: Tensor, losses: Losses = waves, **options: Any) -> Any:
    with fastgrad.record(model):
        return fastgrad.grad_gram(losses(model(x)).sum(), list(model.parameters()), **options)


@pytest.fixture(params=[None, 200], ids=["whole", "parts"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold gradients as a whole, or 200 bytes of them at a time."""
    if request.param:
        monkeypatch.setattr(products, "CHUNK_BYTES", request.param)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("chunk")
def test_inner_products(name: str) -> None:
    model, x = build(name)
    g, parameters = truth(model, x), list(model.parameters())
    with fastgrad.record(model):
        out = loss(model, x)
        norms = fastgrad.grad_sqnorm(out, parameters, retain_graph=True)
        found = fastgrad.grad_gram(out, parameters, retain_graph=True)
        each = fastgrad.grad_gram(out, parameters, each=True)
        with pytest.raises(RuntimeError, match="second time"):
            fastgrad.grad_gram(out, parameters)
    assert found.dtype == torch.float32
    assert_grams(found, g)
    torch.testing.assert_close(found.diagonal(), torch.stack(norms).sum(0), rtol=ALLOWED, atol=0)
    for part, own in zip(each, g, strict=True):
        # A bias before a normalisation has no gradient but roundings of larger numbers.
        scale = torch.cat(g, 1).norm(dim=1)
        assert ((part.double() - own @ own.mT).abs() <= ALLOWED * scale[:, None] * scale).all()
    assert torch.linalg.eigvalsh(found.double()).min() >= -ALLOWED * found.diagonal().sum()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("route", [0, 1], ids=["positions", "formed"])
def test_both_ways_agree(name: str, route: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "seconds", lambda *given: (route, 1 - route))
    model, x = build(name)
    assert_grams(grams(model, x), truth(model, x))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("samples", [3, 7])
def test_two_calls(name: str, samples: int) -> None:
    model, x = build(name)
    y = build(name, samples, seed=1)[1]
    with fastgrad.record(model):
        parameters = list(model.parameters())
        found = fastgrad.grad_gram(loss(model, x), parameters, other=loss(model, y))
        parts = fastgrad.grad_gram(loss(model, x), parameters, other=loss(model, y), each=True)
    assert_grams(found, truth(model, x), truth(model, y))
    torch.testing.assert_close(torch.stack(parts).double().sum(0).float(), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("chunk")
def test_sums_of_squares(name: str) -> None:
    model, x = build(name)
    with fastgrad.record(model):
        found = fastgrad.grad_square_sum(loss(model, x), list(model.parameters()))
    g = truth(model, x)
    largest = torch.cat(g, 1).square().sum()
    for square, own, p in zip(found, g, model.parameters(), strict=True):
        assert square.shape == p.shape
        expected = own.square().sum(0).view(p.shape)
        assert ((square - expected).abs() <= ALLOWED * expected + (ALLOWED**2) * largest).all()


def test_confident_samples_in_float64() -> None:
    model, x = build("linear")
    with torch.no_grad():
        model[2].weight *= 60

    def confident(out: Tensor) -> Tensor:
        return F.cross_entropy(out, out.detach().argmax(1), reduction="none")

    found = grams(model.double(), x.double(), confident)
    assert found.dtype == torch.float64
    assert_grams(found, truth(model, x, confident), allowed=1e-10)


def test_two_losses_and_two_calls() -> None:
    model, x = build("conv")
    y, parameters = x.flip(0) + 1, list(model.parameters())
    with fastgrad.record(model):
        out = model(x)
        found = fastgrad.grad_gram(out.sin().sum(), parameters, other=out.square().sum())
        of_two = fastgrad.grad_gram(loss(model, x) + loss(model, y), parameters)
        none = model(x[:0]).sum()
        assert fastgrad.grad_gram(none, parameters, retain_graph=True).shape == (0, 0)
        assert not fastgrad.grad_square_sum(none, parameters)[0].any()
    assert_grams(found, truth(model, x, torch.sin), truth(model, x, torch.square))
    assert_grams(of_two, [a + b for a, b in zip(truth(model, x), truth(model, y), strict=True)])


def test_parameters_that_one_side_does_not_use_give_zeros() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    x = torch.randn(4, 3)
    with fastgrad.record(model):
        first, second = model[0](x).sum(), model[1](x[:2]).sum()
        parts = fastgrad.grad_gram(first, list(model.parameters()), other=second, each=True, retain_graph=True)
        squares = fastgrad.grad_square_sum(first, list(model.parameters()))
    assert all(part.shape == (4, 2) and not part.any() for part in parts)
    assert squares[0].any()
    assert not squares[2].any()


def test_bad_input() -> None:
    model, stranger, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    parameters, plain, gram = list(model.parameters()), model(x).sum(), fastgrad.grad_gram
    with pytest.raises(RuntimeError, match="grad_gram must be called inside record"):
        gram(plain, parameters)
    with fastgrad.record(stranger):
        foreign = stranger(x).sum()
        with fastgrad.record(model):
            out, fewer = model(x).sum(), model(x[:2]).sum()
            refused: list[tuple[Callable[[], Any], type[Exception], str]] = [
                (lambda: gram(out, parameters, other=plain), RuntimeError, "other must be computed from calls of the"),
                (lambda: gram(out, parameters, other=foreign), ValueError, "other must be .* model; those were"),
                (lambda: gram(out, list(stranger.parameters())), ValueError, "params must be .*; number 0"),
                (lambda: gram(out + fewer, parameters), ValueError, "losses must be .* samples; there were 2 and 4"),
                (lambda: gram(out, parameters, other=3), TypeError, "other must be a tensor"),
            ]
            for call, error, message in refused:
                with pytest.raises(error, match=message):
                    call()


def test_results_that_exceed_memory_name_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)

    def full(*given: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastgrad.gradients.gram.gram", full)
    with (
        fastgrad.record(model),
        pytest.raises(MemoryError, match=r"4 and 4 samples take 256 bytes, and work .* more"),
    ):
        fastgrad.grad_gram(model(x).sum(), list(model.parameters()), each=True)


def test_gradients_are_held_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_BYTES", 4096)
    held, part = [], backward.Share.part
    monkeypatch.setattr(backward.Share, "part", lambda share, at: held.append(found := part(share, at)) or found)
    model, x = build("conv, one position", 8)
    monkeypatch.setattr(products, "seconds", lambda *given: (1, 0))
    grams(model, x)
    assert max(t.nbytes for t in held) <= 2 * model.weight[:, :1].numel() * 8 * 4
