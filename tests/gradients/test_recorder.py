"""record and grad_sqnorm, the drop-in for torch.autograd.grad."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms, relative_error, true_norms
from small_nets import Net, check_losses, check_several, recorded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastgrad


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)
    ).eval()


X = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0])


def loop(model: nn.Module) -> Tensor:
    return true_norms(model, (X,), lambda i, z: z.softmax(1) - F.one_hot(Y[i : i + 1], 3))


def cross_entropy(model: nn.Module, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x), Y, reduction="sum")


def norms_of(model: nn.Module) -> Tensor:
    return recorded(model, lambda: cross_entropy(model))


def assert_close(found: Tensor, truth: Tensor) -> None:
    assert found.shape == truth.shape
    assert relative_error(found, truth, 1e-7).max() < 1e-4


def test_any_order_and_single_parameters(model: nn.Sequential) -> None:
    with fastgrad.record(model):
        loss = cross_entropy(model)
        weight, first = fastgrad.grad_sqnorm(loss, [model[4].weight, model[0].weight], retain_graph=True)
        (only,) = fastgrad.grad_sqnorm(loss, model[4].weight)
    truth = loop(model)
    assert_close(torch.stack((weight, first), 1), truth[:, [4, 0]])
    assert torch.equal(only, weight)


@pytest.mark.parametrize("calls", [1, 2])
def test_several_gradients_at_once(model: nn.Sequential, calls: int) -> None:
    model.add_module("unused", nn.Linear(3, 2))
    run = (lambda x: model[:5](x)) if calls == 1 else (lambda x: model[:5](x) * model[:5](x.flip(3)))
    check_several(model.double(), run, X.double(), torch.randn(6, 4, 3, dtype=torch.float64))


def test_batched_gradients_behind_a_checkpoint_around_the_model(model: nn.Sequential) -> None:
    """Planned outside of it, where gradients go back together; a checkpoint calls the model again on the way back."""
    parameters, gradients = list(model.parameters()), torch.randn(2, 4, 3)
    with fastgrad.record(model):
        found = [
            fastgrad.grad_sqnorm(out, parameters, grad_outputs=gradients, is_grads_batched=True)
            for out in (model(X), checkpoint(model, X, use_reentrant=False))
        ]
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("nested", [False, True])
def test_a_first_call_within_a_checkpoint(nested: bool) -> None:
    """The ordinary call that it is compared with is no part of the checkpoint."""

    def function(net: Any, x: Tensor) -> Tensor:
        h = net.layer(x)
        return checkpoint(lambda h: torch.tanh(net.scale * h), h, use_reentrant=False) if nested else net.scale * h

    torch.manual_seed(0)
    net = Net(function, layer=nn.Linear(4, 3), scale=nn.Parameter(torch.rand(3))).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    check_losses(net, lambda x: checkpoint(net, x, use_reentrant=False).square().sum(1), x)


def test_a_first_call_within_a_checkpoint_counts_once() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        net.count += 1
        return net.layer(x)

    net = Net(function, layer=nn.Linear(4, 3))
    net.register_buffer("count", torch.zeros(()))
    with fastgrad.record(net):
        checkpoint(net, torch.randn(5, 4), use_reentrant=False)
    assert net.count == 1


def of_parts(model: nn.Sequential, x: Tensor) -> Tensor:
    hidden = model[3](model[2](model[1](model[0](x))))
    return model[4](hidden).square().sum(1) + hidden.square().sum(1)


#: Losses ``(B,)`` of several calls, such as a contrastive one of two views.
CALLS: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "parts": of_parts,
    "two views": lambda model, x: (model(x) * model(x.flip(3))).sum(1).cos(),
    "three views": lambda model, x: (model(x) * (model(x.flip(3)) + model(x.roll(1, 2)).cos())).sum(1),
    "a part and the whole": lambda model, x: (model[:4](x) @ model[4].weight.detach().T + model(x)).sum(1),
}


@pytest.mark.parametrize("way", CALLS)
def test_uses_in_several_calls_add_up(model: nn.Sequential, way: str) -> None:
    losses = CALLS[way]
    truth = loss_norms((losses(model, row).sum() for row in X.split(1)), model)
    assert_close(recorded(model, lambda: losses(model, X).sum()), truth)


def test_several_outputs(model: nn.Sequential) -> None:
    with fastgrad.record(model):
        z = model[4](hidden := model[:4](X))
        gradients = [2 * z.detach(), 2 * hidden.detach()]
        found = fastgrad.grad_sqnorm([z, hidden], list(model.parameters()), grad_outputs=gradients)
    assert_close(torch.stack(found, 1), loss_norms((of_parts(model, row).sum() for row in X.split(1)), model))


def test_nothing_stays_on_the_model(model: nn.Sequential) -> None:
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(RuntimeError), fastgrad.record(model):
        model(torch.ones(2, 5, 5, 5))
    with fastgrad.record(model), fastgrad.record(model):
        model(X)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert [dict(vars(m)) for m in model.modules()] == before
    for other in copies:
        assert_close(norms_of(other), loop(model))


def test_other_threads_run_through(model: nn.Sequential) -> None:
    plain = model(X)
    seen: list[bool] = []

    def work() -> None:
        out = model(X)
        seen.append(torch.equal(out, plain) and "Tap" not in str(out.grad_fn))

    with fastgrad.record(model):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [True]


class Slow(nn.Sequential):
    """Has its samples run one by one, for a hook of gradients, which lets other threads run on the way back."""

    def forward(self, x: Tensor) -> Tensor:
        h = self[0](x) * 1.0
        if h.requires_grad:
            h.register_hook(lambda g: time.sleep(0.002) or 2 * g)
        return self[1](h)


def test_threads_share_frozen_parameters_of_samples_that_run_alone() -> None:
    """Each sample runs with copies of frozen parameters, forward and back; no other thread must meet them."""
    torch.manual_seed(0)
    model, x = Slow(nn.Linear(3, 3), nn.Linear(3, 2)).double(), torch.randn(4, 3).double()
    model[1].requires_grad_(False)
    parameters = list(model.parameters())

    def norms(_: int) -> Tensor:
        with fastgrad.record(model):
            return torch.stack(fastgrad.grad_sqnorm(model(x).square().sum(1), model))

    expected = norms(0)
    assert all(bool(own.gt(0).all()) for own in expected)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(norms, range(12)):
            assert_close(found, expected)
    assert all(p is own for p, own in zip(model.parameters(), parameters, strict=True))
    assert [p.requires_grad for p in parameters] == [True, True, False, False]


def test_another_thread_may_leave_and_layers_may_go(model: nn.Sequential) -> None:
    before = [dict(vars(m)) for m in model.modules()]
    layer = model[4]
    recording = fastgrad.record(model)
    recording.__enter__()
    model[4] = nn.Linear(36, 3)
    recording.__enter__()
    for _ in range(2):
        thread = threading.Thread(target=recording.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
    with pytest.raises(RuntimeError, match="inside record"):
        fastgrad.grad_sqnorm(model(X).sum(), model[4].weight)
    assert "forward" not in vars(model[4])
    model[4] = layer
    assert [dict(vars(m)) for m in model.modules()] == before


def test_what_is_refused(model: nn.Sequential) -> None:
    parameters, before = list(model.parameters()), model(X)
    decay, none = parameters[0].square().sum(), "calls of the recorded model, with gradients enabled; they reach none"
    with pytest.raises(RuntimeError, match="inside record"):
        fastgrad.grad_sqnorm(before.sum(), parameters)
    with fastgrad.record(model):
        z, other = model(X).sum(), model(X[:2]).sum()
        refused: list[tuple[Callable[[], Any], type[Exception], str]] = [
            *((lambda out=out: fastgrad.grad_sqnorm(out, parameters), RuntimeError, none)
              for out in (torch.zeros(()), before.sum(), before.sum() + decay, decay)),
            (lambda: fastgrad.grad_sqnorm(z, [nn.Parameter(torch.zeros(2))]), ValueError, "number 0 is not one"),
            (lambda: fastgrad.grad_sqnorm(z, parameters, is_grads_batched=True), ValueError, "grad_outputs must be"),
            (lambda: fastgrad.grad_sqnorm(z * decay, parameters), ValueError, "on '0.weight' through recorded calls"),
            (lambda: fastgrad.grad_sqnorm(z + other, parameters), ValueError,
             r"calls of one number of samples; '0.weight' .* of 2 and 4"),
            (lambda: torch.func.functional_call(model, {n: 2 * p for n, p in model.named_parameters()}, (X,)),
             ValueError, r"parameters of its own; '0.weight' was computed"),
        ]  # fmt: skip
        for call, error, message in refused:
            with pytest.raises(error, match=message):
                call()


def test_a_structure_of_inputs_is_checked_once(model: nn.Sequential) -> None:
    calls = []
    model[4].register_forward_hook(lambda *_: calls.append(1))
    for x, runs in ((X, 2), (X[:3], 1), (X[:1], 2), (X[1:2], 1), (X.clone().requires_grad_(), 2), (X, 1)):
        calls.clear()
        with fastgrad.record(model):
            model(x)
        assert len(calls) == runs


class Prompted(nn.Module):
    """Parameters that other methods than forward use, before calls of modules and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.scale = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))
        self.body = nn.Linear(4, 4)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x + self.prompt))

    def decode(self, h: Tensor) -> Tensor:
        return self.scale * (h @ self.body.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


@pytest.mark.parametrize("name", ["prompt", "scale", "body.weight"])
def test_parameter_used_outside_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model, x = Prompted().double(), torch.randn(5, 4, dtype=torch.float64)
    for loss in (
        lambda: model.decode(model.encode(x)).square().sum(),  # another method
        lambda: model(x).square().sum() + 1e-3 * model.get_parameter(name).square().sum(),  # a weight decay
    ):
        for norms in (fastgrad.grad_sqnorm, fastgrad.grad_gram, fastgrad.grad_square_sum):
            with (
                fastgrad.record(model),
                pytest.raises(ValueError, match=r"losses must depend on '.*' through recorded"),
            ):
                norms(loss(), model)


def test_samples_that_meet_in_the_loss(model: nn.Sequential) -> None:
    parameters = list(model.parameters())
    with fastgrad.record(model):
        z = model(X)
        loss = (z @ z.T).logsumexp(1).sum()
        (delta,) = torch.autograd.grad(loss, z, retain_graph=True)
        found = fastgrad.grad_sqnorm(loss, parameters)
    rows = zip(X.split(1), delta.split(1), strict=True)
    assert_close(torch.stack(found, 1), loss_norms(((model(x) * d).sum() for x, d in rows), model))


def test_casts_that_autocast_keeps_are_of_one_call() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        first, again = (recorded(model, lambda: model(x).float().square().sum()) for _ in range(2))
        assert torch.equal(first, again)
        with pytest.raises(ValueError, match=r"losses must depend on '0\.weight' through recorded calls"):
            recorded(model, lambda: (model(x) + F.linear(x, model[0].weight)[:, :3]).float().square().sum())


def test_a_batch_of_no_samples(model: nn.Sequential) -> None:
    parameters, none = list(model.parameters()), X[:0]
    with fastgrad.record(model):
        for found in (
            fastgrad.grad_sqnorm(model(none).sum(), parameters),
            fastgrad.grad_sqnorm(model(none), parameters, grad_outputs=torch.ones(0, 3)),
        ):
            assert [norms.shape for norms in found] == [(0,)] * len(parameters)
        batched = fastgrad.grad_sqnorm(model(none), parameters, grad_outputs=torch.ones(2, 0, 3), is_grads_batched=True)
        assert [norms.shape for norms in batched] == [(2, 0)] * len(parameters)
    norms = norms_of(model)
    assert_close(norms, loop(model))
