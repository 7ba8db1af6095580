"""Objects among the inputs that a model writes to: caches of keys and values, and containers of the user's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gradient_oracle import relative_error
from torch import Tensor, nn

import fastgrad
from fastgrad import losses


class Cache:
    """Keys that modules add to, as in a model that can go on with its sequence; it holds a reference to itself."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.steps, self.own = {"seen": 0}, self

    def update(self, keys: Tensor) -> Tensor:
        self.keys.append(keys)
        self.steps["seen"] += 1
        return torch.cat(self.keys, 1)


class Cached(nn.Module):
    """A layer without a rule that is given a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        keys = x * self.scale
        return x + (keys.tanh() @ (keys if cache is None else cache.update(keys)).sum(1, keepdim=True).mT) * self.scale


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Cached(), Cached()])

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        cache = Cache() if cache is None else cache
        for layer in self.layers:
            x = layer(x, cache=cache)
        return x[:, -1]


@pytest.mark.parametrize("samples", [1, 3])
def test_a_cache_is_to_a_layer_that_runs_again_what_it_was(samples: int) -> None:
    torch.manual_seed(0)
    model, x = Sequence().double().eval(), torch.randn(samples, 5, 4, dtype=torch.float64)
    extractor = fastgrad.GradientFeatures(model, loss="mse", target="ones")
    _, features = extractor(x)
    each = [(model(one[None]) - 1).square().sum() / 2 for one in x]
    truth = torch.stack([
        torch.stack([g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))]) for loss in each
    ])  # fmt: skip
    assert relative_error(features / features[:1, :1] * truth[:1, :1], truth, 2e-16).max() < 1e-10

    cache = Cache()
    with fastgrad.record(model):
        out = model(x, cache=cache)
        fastgrad.grad_sqnorm(out.square().sum(), list(model.parameters()))
    assert cache.steps == {"seen": 2}
    assert [len(keys) for keys in cache.keys] == [samples, samples]


class Branching(Sequence):
    """Another path for inputs with a negative sum."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return super().forward(x if x.sum() > 0 else x * self.layers[0].scale, cache)


def test_a_cache_is_filled_once_by_a_call_that_is_begun_again() -> None:
    torch.manual_seed(0)
    model = Branching().double().eval()
    x = torch.rand(3, 5, 4, dtype=torch.float64)
    parameters = list(model.parameters())
    for batch in (x, -x):
        cache = Cache()
        with fastgrad.record(model):
            out = model(batch, cache=cache)
            found = fastgrad.grad_sqnorm(out.square().sum(), parameters)
        truth = torch.stack([
            torch.stack([g.square().sum() for g in torch.autograd.grad(model(one[None]).square().sum(), parameters)])
            for one in batch
        ])  # fmt: skip
        assert relative_error(torch.stack(found, 1), truth, 2e-16).max() < 1e-10
        assert cache.steps == {"seen": 2}
        assert cache.own is cache


@pytest.mark.parametrize("given", [{"b"}, type("Names", (dict,), {})(a=["b"]), type("List", (list,), {})(["b"])])
def test_containers_among_the_inputs_are_as_they_were_when_a_call_is_begun_again(given: Any) -> None:
    """The path changes with the sign of the input, so that the second call is begun again."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, names: Any) -> Tensor:
            assert names == before
            names.clear()
            return self.one(x) + self.other(x) if x.sum() > 0 else self.one(x)

    before, filled = copy.deepcopy(given), copy.deepcopy(given)
    model, x = Forked().double(), torch.rand(3, 4, dtype=torch.float64)
    extractor = fastgrad.GradientFeatures(model, loss="bce", target="ones")
    extractor(-x, names=filled)
    assert not filled
    filled = copy.deepcopy(before)
    logits, norms = extractor(x, names=filled)
    assert not filled
    delta = losses.delta(logits, "ones", loss="bce")
    torch.testing.assert_close(norms[:, 1], delta.square().sum(1))
