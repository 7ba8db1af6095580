"""Parameters that several calls use, in layers that compute otherwise under ``vmap`` or without gradients."""

from __future__ import annotations

import pytest
import torch
from gradient_oracle import loss_norms, relative_error
from torch import Tensor, nn
from torch.nn.functional import linear

import fastgrad


class Tied(nn.Module):
    """A table with padding whose rows are also the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(5, 4, padding_idx=-5), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return linear(self.inner(self.table(tokens).mean(1)).tanh(), self.table.weight)


class Twice(Tied):
    """A table with padding that is asked twice."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(self.table(tokens).mean(1) * self.table(tokens[:, :2]).sum(1))


class Encoder(nn.Module):
    """PyTorch's encoder with a mask, one table for two sequences."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.table, self.encoder, self.head = nn.Embedding(5, 4), nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.encoder(self.table(tokens), src_key_padding_mask=tokens == 0)
        return self.head(h[:, -1] + self.table(tokens[:, -1]))


def square(model: nn.Module, tokens: Tensor) -> Tensor:
    return (model(tokens) + 1).square().sum(1)


@pytest.mark.parametrize("made", [Tied, Twice, Encoder])
def test_tables_that_are_used_twice(made: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = made().double().eval()
    # Padding is not among the samples that a plan is tried on, but in those of other calls.
    for rows in ([[1, 2, 3]] * 5 + [[0, 0, 4]], [[0, 1, 2], [3, 0, 4]], [[0, 0, 1]]):
        tokens = torch.tensor(rows)
        parameters = list(model.parameters())
        truth = torch.stack([
            torch.stack([g.square().sum() for g in torch.autograd.grad(square(model, one[None]).sum(), parameters)])
            for one in tokens
        ])  # fmt: skip
        with fastgrad.record(model):
            found = fastgrad.grad_sqnorm(square(model, tokens).sum(), parameters)
        assert relative_error(torch.stack(found, 1), truth, 2e-16).max() < 1e-10


class Gathered(nn.Module):
    """Rows in the order of their sums, through a layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        order = x.sum(1).argsort()
        return (x[order] * self.scale).tanh()[order.argsort()]


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_gradients_whose_squares_leave_the_range_of_float32(factor: float) -> None:
    torch.manual_seed(0)
    model, x = Gathered().double().eval(), torch.randn(6, 4, dtype=torch.float64)
    with fastgrad.record(model):
        (found,) = fastgrad.grad_sqnorm(factor * model(x).square().sum(), [model.scale])
    truth = [torch.autograd.grad(factor * model(one[None]).square().sum(), model.scale)[0].square().sum() for one in x]
    torch.testing.assert_close(found, torch.stack(truth), rtol=1e-10, atol=0)


class States(nn.Module):
    """Classes, and in evaluation mode the states of all steps, steps first; one scale for both halves of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.rand(4) + 0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        steps = x.transpose(0, 1)
        states = torch.cat([(half @ self.scale.diag()).tanh() for half in steps.chunk(2)])
        return (self.head(states.sum(0)),) if self.training else (self.head(states.sum(0)), states)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_with_the_batch_elsewhere(training: bool) -> None:
    torch.manual_seed(0)
    model, x = States().double().train(training), torch.randn(3, 6, 4, dtype=torch.float64)
    parameters = list(model.parameters())

    def loss(out: tuple[Tensor, ...]) -> Tensor:
        return out[0].square().sum() + sum(states.pow(3).sum() for states in out[1:])

    truth = torch.stack([
        torch.stack([g.square().sum() for g in torch.autograd.grad(loss(model(one[None])), parameters)]) for one in x
    ])  # fmt: skip
    with fastgrad.record(model):
        found = fastgrad.grad_sqnorm(loss(model(x)), parameters)
    assert relative_error(torch.stack(found, 1), truth, 2e-16).max() < 1e-10
    with fastgrad.clip_gradients(model, 1e3) as clipped:
        out = model(x)
        norms = clipped.backward(out[0].square().sum(1) + sum(states.pow(3).sum((0, 2)) for states in out[1:]))
    torch.testing.assert_close(norms.square(), truth.sum(1), rtol=1e-10, atol=0)


class Forces(nn.Module):
    """The gradient of an energy, which the model itself takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.second(torch.tanh(self.first(x)))
            return torch.autograd.grad(energy.sum(), x, create_graph=True)[0] + energy


def test_a_model_that_takes_gradients() -> None:
    torch.manual_seed(0)
    model, x = Forces().double().eval(), torch.randn(5, 4).double()
    with fastgrad.record(model):
        found = fastgrad.grad_sqnorm(model(x).square().sum(), list(model.parameters()))
    truth = loss_norms((model(row).square().sum() for row in x.split(1)), model)
    torch.testing.assert_close(torch.stack(found, 1), truth)


class Bag(nn.Module):
    """A bag of embeddings whose offsets are those of all samples together."""

    def __init__(self, *, sparse: bool, offsets: bool) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(5, 4, mode="sum", sparse=sparse), nn.Linear(4, 3)
        self.offsets = offsets

    def forward(self, tokens: Tensor) -> Tensor:
        starts = torch.arange(len(tokens)) * tokens.shape[1]
        h = self.table(tokens.flatten(), starts) if self.offsets else self.table(tokens)
        return self.head(h.tanh())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
def test_bags_of_embeddings(sparse: bool, offsets: bool) -> None:
    torch.manual_seed(0)
    model, tokens = Bag(sparse=sparse, offsets=offsets).double(), torch.randint(0, 5, (6, 7))
    with fastgrad.record(model):
        found = fastgrad.grad_sqnorm(square(model, tokens).sum(), list(model.parameters()))
    model.table.sparse = False
    truth = loss_norms((square(model, one[None]).sum() for one in tokens), model)
    assert relative_error(torch.stack(found, 1), truth, 2e-16).max() < 1e-10


class Unmapped(nn.Module):
    """Layers of which PyTorch has no form for several samples under ``vmap``, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.cell = nn.EmbeddingBag(5, 4), nn.GRUCell(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.cell(self.bag(tokens), self.cell(self.bag(tokens[:, :2]), tokens[:, :1].expand(-1, 4) / 5))
        return self.normed(h) + self.normed(h.tanh())


def test_pytorch_warns_of_its_own_vmaps_alone(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    model, tokens = Unmapped(), torch.randint(5, (6, 3))
    pairs = [("bce", "ones"), ("cross_entropy", "ones")]
    extractor = fastgrad.GradientFeatures(model, signals=pairs)
    extractor(tokens)
    assert {route.route for route in extractor.report()} == {"fallback"}
    assert not recwarn
    torch.func.vmap(lambda one: model.bag(one[None]))(tokens)
    assert "performance drop" in str(recwarn.pop().message)
