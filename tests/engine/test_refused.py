"""Models and losses that have no gradient per sample, or no values: refused by name, or each sample alone is right."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms
from small_nets import (
    Net,
    alone,
    assert_exact,
    assert_same,
    check,
    features_of_squares,
    inputs,
    left,
    parts,
    recorded,
    squares,
)
from torch import Tensor, nn

import fastgrad

X = inputs(5, 3)
APART = "model must treat the samples of a batch independently, or there is no gradient per sample; "


def crops(net: Any, x: Tensor) -> Tensor:
    """Three crops of each image stand one behind the other."""
    return net.head(x).unflatten(0, (-1, 3)).mean(1)


#: Functions, and what the refusal says.
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "mean": (lambda net, x: net.head(x - x.mean(0)),
        APART + "for one sample alone, its output differs from that in the batch"),
    "detached": (lambda net, x: net.head(x / x.abs().max().detach()), APART),
    "size": (lambda net, x: net.head(x) / len(x), APART),
    "neighbours": (lambda net, x: net.head(x.roll(1, 0)), APART),
    "branch": (lambda net, x: net.head(net.layer(x) if x.abs().max() > 2 else x), APART),
    "by name": (lambda net, x: {"logits": net.head(x - x.mean(0)), "h": net.layer(x)},
        f"({APART}|outputs must not depend on output .*joins the samples)"),
    "in float32": (lambda net, x: net.head((x - x.float().mean(0)).double()), APART),
    "in bfloat16": (lambda net, x: net.head(x.bfloat16().double() - x.bfloat16().mean(0)), APART),
    "attention over samples": (lambda net, x: net.head((x @ x.T).softmax(1) @ x), APART),
    "beside random numbers": (
        lambda net, x: net.head(x + torch.randn(2, len(x), 3).double().sum(0) - x.mean(0)), APART),
    "attribute of rows": (lambda net, x: net.head((net.layer(x) + net.rows) @ net.matrix),
        "model must not read an attribute of the batch that no recorded call wrote; 'rows' has a row for each"),
    "statistics": (
        lambda net, x: net.head(F.batch_norm(x, torch.ones(3).double(), torch.ones(3).double(), training=True)),
        "it normalises with the statistics of the batch"),
    "frequencies": (lambda net, x: F.embedding((x > 0).long(), net.matrix, scale_grad_by_freq=True).sum(1),
        "an embedding divides gradients by counts over the batch"),
    "beside dropout": (lambda net, x: net.head(F.dropout(x, 0.5, net.training) - x.mean(0)), APART),
    "products": (lambda net, x: net.head(x) @ net.head(x).mT, "model must not join the samples of a batch; its "),
    "crops": (crops, "model must run on each sample alone, as a batch of one; .* RuntimeError: unflatten"),
}  # fmt: skip


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("samples", [2, 6])
def test_samples_that_meet_are_refused(way: str, samples: int) -> None:
    function, message = REFUSED[way]
    x = inputs(6, 3)[:samples]
    model = parts(function, rows=inputs(samples, 3, seed=1))
    model.train(way == "beside dropout")
    x[0] *= 9
    before = left(model)
    for call in (features_of_squares(model), lambda x: recorded(model, lambda: squares(model(x)))):
        if samples > 2 or way != "crops":  # which is as a batch of one there
            with pytest.raises(ValueError, match=f"(?s){message}"):
                call(x)
            assert_same(left(model), before)
    if way in ("mean", "detached", "size", "branch"):
        check(model, (X[:1],))


#: What makes a call one of another structure, so that it is compared: whether it is so, and the change.
ANOTHER: dict[str, tuple[Callable[[Any, Tensor], bool], Callable[[Any, Tensor], Any]]] = {
    "training mode": (lambda net, x: net.training, lambda net, x: (net.train(), x)[1]),
    "dimensions": (lambda net, x: x.dim() == 3, lambda net, x: x.unsqueeze(1)),
    "dtype": (lambda net, x: x.dtype == torch.float32, lambda net, x: x.float()),
    "gradients of the input": (lambda net, x: x.requires_grad, lambda net, x: x.clone().requires_grad_()),
    "hook": (lambda net, x: len(net.layer._forward_hooks) > 0,
        lambda net, x: (net.layer.register_forward_hook(lambda *_: None), x)[1]),
    "nesting": (lambda net, x: isinstance(x, list), lambda net, x: [x]),
}  # fmt: skip


@pytest.mark.parametrize("way", ANOTHER)
def test_samples_that_meet_in_a_call_of_another_structure(way: str) -> None:
    meets, change = ANOTHER[way]

    def function(net: Any, x: Any) -> Tensor:
        h = net.layer((x[0] if isinstance(x, list) else x).double())
        return net.head(h - h.mean(0) if meets(net, x) else h)

    model = parts(function)
    recorded(model, lambda: squares(model(X)))
    changed = change(model, X)
    with pytest.raises(ValueError, match=APART):
        recorded(model, lambda: squares(model(changed)))


@pytest.mark.parametrize("first", [False, True])
def test_samples_that_meet_where_a_boolean_says_so(first: bool) -> None:
    model = parts(lambda net, x, flag: net.head(x - x.mean(0) if flag else x))
    for flag in (first, not first):
        with pytest.raises(ValueError, match=APART) if flag else contextlib.nullcontext():
            recorded(model, functools.partial(lambda flag: squares(model(X, flag)), flag))


#: Functions whose samples meet only after something changed, and what that is.
LATER: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    "attribute": (lambda net, x: net.head(F.normalize(net.layer(x), dim=net.dim)), lambda net: setattr(net,
        "dim", 0)),
    "weight": (lambda net, x: net.head(((h := net.layer(x).tanh()) - h.mean(0)) @ net.matrix),
        lambda net: nn.init.normal_(net.head.weight)),
}  # fmt: skip


@pytest.mark.parametrize("way", LATER)
def test_samples_that_meet_later(way: str) -> None:
    """The check is made once for a structure of inputs; in a later call, too, no sample sees another."""
    function, change = LATER[way]
    model = parts(function, dim=1)
    nn.init.constant_(model.head.weight, float(way != "weight"))
    check(model, (X,))
    change(model)
    truth = alone(model, (X,))
    assert_exact(recorded(model, lambda: model(X).square().sum()), truth)
    if way != "weight":
        assert_exact(features_of_squares(model)(X)[1], truth)


def test_error_of_all_samples_is_the_models() -> None:
    model = parts(crops)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        recorded(model, lambda: model(inputs(9, 5)).sum())


def guarded(net: Any, x: Tensor) -> Tensor:
    def guard(gradient: Tensor) -> None:
        if gradient.abs().max() > 100:
            raise RuntimeError("a large gradient")

    out = net.layer(x)
    if out.requires_grad:
        out.register_hook(guard)
    return net.head(out.tanh())


def test_errors_of_a_later_backward_pass_stay() -> None:
    model = parts(guarded)
    check(model, (X,))
    with pytest.raises(RuntimeError, match=r"^a large gradient$"):
        recorded(model, lambda: 1e4 * model(X).square().sum())


def test_two_batch_sizes_in_one_call() -> None:
    """The batch is that of the first tensor; what a layer makes of another is a row for each sample."""
    model = parts(lambda net, x, y: (net.head(x), net.head(y)))
    with fastgrad.record(model):
        first, second = model(X, inputs(8, 3))
        found = fastgrad.grad_sqnorm(first.square().sum(), list(model.parameters()))
        assert second.shape == (5, 8, 2)
    assert_exact(torch.stack(found, 1), alone(parts(lambda net, x: net.head(x)), (X,)))


@pytest.mark.parametrize("layer", [nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), nn.GRU(3, 2)], ids=str)
def test_a_parameter_that_is_edited_between_forward_and_norms(layer: nn.Module) -> None:
    """Autograd's own error, where the backward pass needs the value that is gone."""
    model = Net(
        lambda net, x: net.layer(x.transpose(0, 1))[0] if isinstance(layer, nn.GRU) else net.layer(x), layer=layer
    )
    with fastgrad.record(model):
        loss = model(torch.randn(4, 5, 3) if isinstance(layer, nn.GRU) else X.float()).sum()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            fastgrad.grad_sqnorm(loss, list(model.parameters()))


def test_values_that_are_not_finite() -> None:
    bad = X.clone()
    bad[1] = torch.nan
    for first in (X, bad):
        model = parts(lambda net, x: net.head(net.layer(x).tanh()))
        recorded(model, lambda first=first, model=model: model(first).sum())
        found = recorded(model, lambda model=model: model(bad).square().sum())
        assert found[:, :6].isnan().any(1).tolist() == [i == 1 for i in range(5)]
        assert_exact(found[[0, 2, 3, 4]], alone(model, (bad[[0, 2, 3, 4]],)))


@pytest.mark.parametrize("way", ["rule", "copies"])
def test_a_penalty_of_gradients_is_refused(way: str) -> None:
    model = parts(lambda net, x: net.layer(x) if way == "rule" else torch.tanh(x @ torch.diag(net.scale)))
    x, parameters = X.clone().requires_grad_(), list(model.parameters())
    with fastgrad.record(model):
        out = model(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(ValueError, match=r"losses must .* (outside of them|gradient)"):
            fastgrad.grad_sqnorm(gradient.square().sum() + out.sum(), parameters, retain_graph=True)
        # What depends on no gradient is found.
        plain = fastgrad.grad_sqnorm(out.square().sum(), parameters, retain_graph=True)
    assert_exact(torch.stack(plain, 1), alone(model, (X,)))


def test_random_numbers_in_evaluation_mode() -> None:
    """Norms are those of what was drawn; no generator is set back."""
    model = parts(lambda net, x: net.head(x * torch.rand(len(x), 3, generator=net.own)), own=torch.Generator())
    for _ in range(2):
        with fastgrad.record(model):
            losses = model(X).square().sum(1)
            found = torch.stack(fastgrad.grad_sqnorm(losses, model, retain_graph=True), 1)
            assert_exact(found, loss_norms(losses, model))


@pytest.mark.filterwarnings("ignore")
def test_rounding_is_no_mixing() -> None:
    saturated = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = Net(lambda net, x: net.head(net.body(x).mean(1)), body=saturated, head=nn.Linear(16, 3)).eval()
    _, norms = fastgrad.GradientFeatures(model)(1e4 * torch.randn(6, 7, 16))
    assert norms.isfinite().all()
