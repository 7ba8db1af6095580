"""grad_gram and grad_square_sum against a float64 gradient of each sample alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgrad
from fastgrad.engine import backward, products

# PyTorch says so once a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

#: Relative to the product of two norms: some sums of thousands of roundings.
ALLOWED = 100 * torch.finfo(torch.float32).eps


class Reused(nn.Module):
    """One linear function called three times, and its weight turned by a product from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 6), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.linear(x))
        return x @ self.linear.weight * self.scale


class Tied(nn.Module):
    def __init__(self, words: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(words, 5, padding_idx=1)
        self.mix = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.table(x))), self.table.weight).mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.inner = kind(3, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0].sum(1)


class Unrolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


class Groups(nn.Module):
    """Samples take one of two paths by the sign of their first number."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        if (x[:, 0] < 0).any():
            h = torch.where(x[:, :1] < 0, torch.tanh(self.two(x)), h)
        return self.last(h)


class Alone(nn.Module):
    """``nonzero`` has shapes that depend on data, so that samples run alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        at = (h > 0).nonzero(as_tuple=True)
        return self.last(torch.zeros_like(h).index_put(at, h[at]))


def net(*layers: nn.Module, tail: bool = True) -> nn.Sequential:
    return nn.Sequential(*layers, *([nn.Flatten()] if tail else []))


def words(length: int, size: int = 11) -> Callable[[int], Tensor]:
    return lambda samples: torch.randint(size, (samples, length))


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda samples: torch.randn(samples, *shape)


ROWS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (lambda: net(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), normal(6)),
    "positions": (lambda: net(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), normal(4, 6)),
    "many positions": (lambda: net(nn.Linear(3, 2), nn.Tanh()), normal(60, 3)),
    "few positions": (lambda: net(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 3)), normal(2, 300)),
    "reused": (Reused, normal(6)),
    "reused, positions": (Reused, normal(3, 6)),
    "embedding": (lambda: net(nn.Embedding(11, 3, padding_idx=2), nn.Flatten(), nn.Linear(21, 2)), words(7)),
    "embedding, one index": (lambda: net(nn.Embedding(11, 3), nn.Flatten(), nn.Linear(3, 2)), words(1)),
    "tied": (Tied, words(6)),
    "tied, large table": (lambda: Tied(5000), words(2, 5000)),
    "conv": (lambda: net(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 2)), normal(3, 8, 8)),
    "conv, one position": (lambda: net(nn.Conv2d(30, 40, 3)), normal(30, 3, 3)),
    "conv, dilated": (lambda: net(nn.Conv1d(3, 4, 3, dilation=2, padding="same")), normal(3, 9)),
    "conv3d": (lambda: net(nn.Conv3d(2, 3, 2, stride=2)), normal(2, 4, 5, 4)),
    "conv, groups": (lambda: net(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)), normal(4, 7, 7)),
    "transposed": (lambda: net(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)), normal(4, 5, 5)),
    "transposed, one position": (lambda: net(nn.ConvTranspose2d(40, 30, 2)), normal(40, 1, 1)),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=2), normal(5, 3)),
    "gru": (lambda: Recurrent(nn.GRU), normal(5, 3)),
    "unrolled cell": (Unrolled, normal(5, 3)),
    "norms": (
        lambda: net(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True),
            nn.LayerNorm([4, 4]),
        ),
        normal(3, 6, 6),
    ),
    "attention": (lambda: net(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)), normal(3, 4)),
    "copies": (lambda: net(nn.Linear(6, 4), nn.PReLU(4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
               normal(6)),
    "groups": (Groups, normal(6)),
    "alone": (Alone, normal(6)),
    "one sample": (lambda: net(nn.Linear(6, 5)), lambda samples: torch.randn(1, 6)),
}  # fmt: skip


def build(name: str, samples: int = 5, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    make, inputs = ROWS[name]
    return make().eval(), inputs(samples)


def loss(out: Tensor) -> Tensor:
    return (out.flatten(1).sin() * torch.arange(1, out[0].numel() + 1)).sum()


def truth(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = loss) -> list[Tensor]:
    """Gradients ``(B, numel)`` of each parameter in float64."""
    model = copy.deepcopy(model).double()
    parameters, rows = list(model.parameters()), []
    for one in x.double().split(1) if x.is_floating_point() else x.split(1):
        found = torch.autograd.grad(loss(model(one)), parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        rows.append([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])
    return [torch.stack(each) for each in zip(*rows, strict=True)]


def assert_grams(found: Tensor, g: list[Tensor], h: list[Tensor] | None = None, allowed: float = ALLOWED) -> None:
    left, right = torch.cat(g, 1), torch.cat(h or g, 1)
    scale = left.norm(dim=1)[:, None] * right.norm(dim=1)
    assert found.shape == scale.shape
    assert ((found.double() - left @ right.mT).abs() <= allowed * scale + 1e-300).all()


def grams(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = loss, **options: Any) -> Any:
    with fastgrad.record(model):
        return fastgrad.grad_gram(loss(model(x)), list(model.parameters()), **options)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("held", [None, 200], ids=["whole", "parts"])
def test_inner_products(name: str, held: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if held:
        monkeypatch.setattr(products, "CHUNK_BYTES", held)
    model, x = build(name)
    g = truth(model, x)
    found = grams(model, x)
    assert found.dtype == torch.float32
    assert_grams(found, g)
    for part, own in zip(grams(model, x, each=True), g, strict=True):
        # A bias before a normalisation has no gradient but roundings of larger numbers.
        scale = torch.cat(g, 1).norm(dim=1)
        assert ((part.double() - own @ own.mT).abs() <= ALLOWED * scale[:, None] * scale).all()
    least = torch.linalg.eigvalsh(found.double()).min()
    assert least >= -ALLOWED * found.diagonal().sum()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("route", [0, 1], ids=["positions", "formed"])
def test_both_ways_agree(name: str, route: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "seconds", lambda *given: (route, 1 - route))
    model, x = build(name)
    assert_grams(grams(model, x), truth(model, x))


@pytest.mark.parametrize("name", ROWS)
def test_the_diagonal_is_that_of_norms(name: str) -> None:
    model, x = build(name)
    with fastgrad.record(model):
        out = loss(model(x))
        norms = fastgrad.grad_sqnorm(out, list(model.parameters()), retain_graph=True)
        found = fastgrad.grad_gram(out, list(model.parameters()))
    torch.testing.assert_close(found.diagonal(), torch.stack(norms).sum(0), rtol=ALLOWED, atol=0)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("samples", [3, 7])
def test_two_calls(name: str, samples: int) -> None:
    model, x = build(name)
    y = build(name, samples, seed=1)[1]
    with fastgrad.record(model):
        parameters = list(model.parameters())
        found = fastgrad.grad_gram(loss(model(x)), parameters, other=loss(model(y)))
        parts = fastgrad.grad_gram(loss(model(x)), parameters, other=loss(model(y)), each=True)
    assert_grams(found, truth(model, x), truth(model, y))
    torch.testing.assert_close(torch.stack(parts).double().sum(0).float(), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("held", [None, 200], ids=["whole", "parts"])
def test_sums_of_squares(name: str, held: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if held:
        monkeypatch.setattr(products, "CHUNK_BYTES", held)
    model, x = build(name)
    with fastgrad.record(model):
        found = fastgrad.grad_square_sum(loss(model(x)), list(model.parameters()))
    g = truth(model, x)
    largest = torch.cat(g, 1).square().sum()
    for square, own, p in zip(found, g, model.parameters(), strict=True):
        assert square.shape == p.shape
        expected = own.square().sum(0).view(p.shape)
        assert ((square - expected).abs() <= ALLOWED * expected + (ALLOWED**2) * largest).all()


def test_confident_samples() -> None:
    model, x = build("linear")
    with torch.no_grad():
        model[2].weight *= 60

    def confident(out: Tensor) -> Tensor:
        return F.cross_entropy(out, out.detach().argmax(1), reduction="sum")

    assert_grams(grams(model.double(), x.double(), confident), truth(model, x, confident), allowed=1e-10)


def test_float64() -> None:
    model, x = build("conv")
    found = grams(model.double(), x.double())
    assert found.dtype == torch.float64
    assert_grams(found, truth(model, x), allowed=1e-13)


def test_two_losses_of_one_call() -> None:
    model, x = build("conv")
    with fastgrad.record(model):
        out = model(x)
        found = fastgrad.grad_gram(loss(out), list(model.parameters()), other=out.square().sum())
    assert_grams(found, truth(model, x), truth(model, x, lambda out: out.square().sum()))


def test_uses_in_two_calls_add_up() -> None:
    model, x = build("conv")
    y = x.flip(0) + 1
    with fastgrad.record(model):
        found = fastgrad.grad_gram(loss(model(x)) + loss(model(y)), list(model.parameters()))
    assert_grams(found, [a + b for a, b in zip(truth(model, x), truth(model, y), strict=True)])


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


def test_no_samples() -> None:
    model = nn.Linear(3, 2)
    with fastgrad.record(model):
        out = model(torch.zeros(0, 3)).sum()
        assert fastgrad.grad_gram(out, list(model.parameters())).shape == (0, 0)
        assert not fastgrad.grad_square_sum(out, model.weight)[0].any()


def test_the_graph_is_kept_if_asked_for() -> None:
    model, x = build("linear")
    with fastgrad.record(model):
        out = loss(model(x))
        first = fastgrad.grad_gram(out, list(model.parameters()), retain_graph=True)
        assert torch.equal(fastgrad.grad_gram(out, list(model.parameters())), first)
        with pytest.raises(RuntimeError, match="second time"):
            fastgrad.grad_gram(out, list(model.parameters()))


def test_bad_input() -> None:
    model, stranger, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match="grad_gram must be called inside record"):
        fastgrad.grad_gram(model(x).sum(), parameters)
    plain = model(x).sum()
    with fastgrad.record(stranger):
        foreign = stranger(x).sum()
        with fastgrad.record(model):
            out = model(x).sum()
            with pytest.raises(RuntimeError, match="other must be computed from calls of the recorded model"):
                fastgrad.grad_gram(out, parameters, other=plain)
            with pytest.raises(ValueError, match="other must be computed from calls of the recorded model; those were"):
                fastgrad.grad_gram(out, parameters, other=foreign)
            with pytest.raises(ValueError, match="params must be parameters of the recorded model; number 0"):
                fastgrad.grad_gram(out, list(stranger.parameters()))
            with pytest.raises(ValueError, match=r"outputs must be .* one number of samples; there were 2 and 4"):
                fastgrad.grad_gram(out + model(x[:2]).sum(), parameters)
            with pytest.raises(TypeError, match="other must be a tensor"):
                fastgrad.grad_gram(out, parameters, other=3)


def test_results_that_exceed_memory_name_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)

    def full(*given: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastgrad.gradients.gram.gram", full)
    with fastgrad.record(model), pytest.raises(MemoryError, match="4 and 4 samples take 256 bytes"):
        fastgrad.grad_gram(model(x).sum(), list(model.parameters()), each=True)


def test_gradients_are_held_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_BYTES", 4096)
    held, part = [], backward.Share.part
    monkeypatch.setattr(backward.Share, "part", lambda share, at: held.append(found := part(share, at)) or found)
    model, x = build("conv, one position", 8)
    monkeypatch.setattr(products, "seconds", lambda *given: (1, 0))
    grams(model, x)
    assert max(t.nbytes for t in held) <= 2 * model[0].weight[:, :1].numel() * 8 * 4
