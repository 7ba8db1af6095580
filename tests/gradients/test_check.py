"""``check``: what it says of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import inputs, left, parts
from torch import Tensor, nn

import fastgrad

X = inputs(4, 3)


def test_outputs_routes_and_random_numbers() -> None:
    def function(net: Any, x: Tensor) -> Any:
        h = F.dropout(net.layer(x), 0.5, net.training)
        return {"logits": net.head(h), "loss": h.square().mean(), "sizes": torch.arange(2), "turned": h.T, "word": "a"}

    model = parts(function).train()
    before = left(model)
    state = torch.get_rng_state()
    found = fastgrad.check(model, X)
    assert torch.equal(state, torch.get_rng_state())
    assert left(model).keys() == before.keys()
    assert found.outputs == {
        "['logits']": "dimension 0", "['loss']": "a row for each sample", "['sizes']": "the same for all samples",
        "['turned']": "dimension 1",
    }  # fmt: skip
    assert found.mixes == ()
    assert found.draws == ("dropout",)
    assert {route.parameter: route.route for route in found.routes}["layer.weight"] == "rule"
    assert found.dtype == torch.float64
    assert "samples do not interact (torch.float64)" in str(found)
    assert "draws random numbers: dropout" in str(found)


def noted(net: Any, x: Tensor) -> Tensor:
    net.noted = net.layer(x) - x.mean(0)
    return net.head(x)


def test_what_mixes_is_named() -> None:
    assert fastgrad.check(parts(lambda net, x: net.head(x - 1e-5 * x.mean(0))).float(), X.float()).mixes == (
        "its output differs from that in the batch",
    )
    assert fastgrad.check(parts(noted, noted=None), X).mixes == ("attribute 'noted' differs from that in the batch",)
    (mixed,) = set(fastgrad.check(parts(lambda net, x: net.head(x) @ net.head(x).T), X).mixes)
    assert "must not join the samples" in mixed
    assert "mixes samples: its output differs" in str(fastgrad.check(parts(lambda net, x: net.head(x.roll(1, 0))), X))


def test_mixing_that_a_zero_hides_shows_after_training() -> None:
    model = parts(lambda net, x: net.head(x) + net.gate * x.mean(0).sum(), gate=nn.Parameter(torch.zeros(())))
    assert not fastgrad.check(model, X).mixes
    model.gate.data.fill_(0.1)
    assert fastgrad.check(model, X).mixes


def test_a_model_that_float64_does_not_run() -> None:
    model = parts(lambda net, x: net.head(x.float() @ torch.ones(3, 3))).float()
    found = fastgrad.check(model, X.float())
    assert (found.dtype, found.mixes) == (torch.float32, ())


def test_bad_input() -> None:
    model = parts(lambda net, x: net.head(x))
    with pytest.raises(ValueError, match=r"inputs must hold at least two samples, .*; they held 1"):
        fastgrad.check(model, X[:1])
    with pytest.raises(TypeError, match="batch_dims must be None, 0, or a mapping"):
        fastgrad.check(model, X, batch_dims="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch norm '1' is in training mode"):
        fastgrad.check(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), X.float())
