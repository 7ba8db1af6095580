"""Objects among the inputs that a model writes to: caches of keys and values, and containers of the user's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms
from small_nets import Net, assert_exact, recorded
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


def cached(net: Any, x: Tensor, cache: Cache | None = None) -> Tensor:
    """A layer without a rule that is given a cache."""
    # Of a parameter itself a broadcast product would have one copy a sample.
    keys = x * net.scale.exp()
    return x + (keys.tanh() @ (keys if cache is None else cache.update(keys)).sum(1, keepdim=True).mT) * net.scale


def in_sequence(net: Any, x: Tensor, cache: Cache | None = None) -> Tensor:
    cache = Cache() if cache is None else cache
    for layer in net.layers:
        x = layer(x, cache=cache)
    return x[:, -1]


def branching(net: Any, x: Tensor, cache: Cache | None = None) -> Tensor:
    """Another path for inputs with a negative sum."""
    return in_sequence(net, x if x.sum() > 0 else x * net.layers[0].scale, cache)


def two_layers(function: Callable[..., Tensor]) -> Net:
    scales = [nn.Parameter(torch.rand(4) + 0.5) for _ in range(2)]
    return Net(function, layers=nn.ModuleList(Net(cached, scale=scale) for scale in scales)).double().eval()


@pytest.mark.parametrize("samples", [1, 3])
def test_a_cache_is_to_a_layer_that_runs_again_what_it_was(samples: int) -> None:
    torch.manual_seed(0)
    model, x = two_layers(in_sequence), torch.randn(samples, 5, 4, dtype=torch.float64)
    extractor = fastgrad.GradientFeatures(model, loss="mse", target="ones")
    _, features = extractor(x)
    truth = loss_norms(((model(one[None]) - 1).square().sum() / 2 for one in x), model)
    assert_exact(features / features[:1, :1] * truth[:1, :1], truth)

    cache = Cache()
    with fastgrad.record(model):
        out = model(x, cache=cache)
        fastgrad.grad_sqnorm(out.square().sum(), list(model.parameters()))
    assert cache.steps == {"seen": 2}
    assert [len(keys) for keys in cache.keys] == [samples, samples]


def test_a_cache_is_filled_once_by_a_call_that_is_begun_again() -> None:
    torch.manual_seed(0)
    model, x = two_layers(branching), torch.rand(3, 5, 4, dtype=torch.float64)
    for batch in (x, -x):
        cache = Cache()
        found = recorded(model, lambda cache=cache, batch=batch: model(batch, cache=cache).square().sum())
        assert_exact(found, loss_norms((model(one[None]).square().sum() for one in batch), model))
        assert cache.steps == {"seen": 2}
        assert cache.own is cache


@pytest.mark.parametrize("given", [{"b"}, type("Names", (dict,), {})(a=["b"]), type("List", (list,), {})(["b"])])
def test_containers_among_the_inputs_are_as_they_were_when_a_call_is_begun_again(given: Any) -> None:
    """The path changes with the sign of the input, so that the second call is begun again."""

    def forked(net: Any, x: Tensor, names: Any) -> Tensor:
        assert names == before
        assert not getattr(names, "seen", False)
        names.clear()
        if hasattr(names, "__dict__"):
            names.seen = True
        return net.one(x) + net.other(x) if x.sum() > 0 else net.one(x)

    before, filled = copy.deepcopy(given), copy.deepcopy(given)
    model, x = Net(forked, one=nn.Linear(4, 3), other=nn.Linear(4, 3)).double(), torch.rand(3, 4, dtype=torch.float64)
    extractor = fastgrad.GradientFeatures(model, loss="bce", target="ones")
    extractor(-x, names=filled)
    assert not filled
    filled = copy.deepcopy(before)
    logits, norms = extractor(x, names=filled)
    assert not filled
    delta = losses.delta(logits, "ones", loss="bce")
    torch.testing.assert_close(norms[:, 1], delta.square().sum(1))
