"""Sequences of calls: targets of a batch, masks, graphs, memory, steps of an optimizer, parameters of two models."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms, true_norms
from small_nets import Net
from torch import Tensor, nn
from torch.nn.modules import module

import fastgrad
from fastgrad import losses

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 1, 0, 1, 1])


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("target", [Y, F.one_hot(Y, 2).double() * 0.7])
def test_targets_of_a_call(model: nn.Sequential, chunk_size: int | None, target: Tensor) -> None:
    extractor = fastgrad.GradientFeatures(model, loss="cross_entropy", chunk_size=chunk_size)
    truth = true_norms(model, (X,), lambda i, z: losses.delta(z, target[i : i + 1], loss="cross_entropy"))
    torch.testing.assert_close(extractor(X, target=target)[1], truth)
    one, *same = (fastgrad.GradientFeatures(model, target=t)(X)[1] for t in (1, lambda _: 1, lambda _: torch.tensor(1)))
    assert all(torch.equal(one, other) for other in same)


def masked(net: Any, x: Tensor, mask: Tensor) -> Tensor:
    return net.head(torch.tanh(mask @ net.layer(x)).mean(1))


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
def test_a_mask_of_positions_is_no_batch(samples: int) -> None:
    torch.manual_seed(0)
    model = Net(masked, layer=nn.Linear(3, 3), head=nn.Linear(3, 2)).double()
    x = torch.randn(samples, samples, 3).double()
    mask = torch.ones(samples, samples).tril().double()
    for chunk_size in (None, 2):
        _, features = fastgrad.GradientFeatures(model, loss="mse", chunk_size=chunk_size)(x, mask)
        rows = [true_norms(model, (one,), lambda _, z: 2 * (z - 1), mask=mask) for one in x.unsqueeze(1)]
        torch.testing.assert_close(features, torch.cat(rows))


def test_memory_of_a_long_recording_is_flat(model: nn.Sequential) -> None:
    counts = []
    gc.freeze()  # what other tests have made is neither searched nor counted
    try:
        with fastgrad.record(model):
            for _ in range(12):
                fastgrad.grad_sqnorm(model(X).sum(), list(model.parameters()))
                gc.collect()
                counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert counts[-1] <= counts[5] + 2


def test_towers_of_two_batch_sizes(model: nn.Sequential) -> None:
    towers = nn.ModuleDict({"a": model, "b": nn.Linear(3, 2).double(), "c": nn.Linear(2, 2).double()})
    with fastgrad.record(towers):
        loss = towers["a"](X).sum() + towers["b"](X[:2]).sum()
        a, b = fastgrad.grad_sqnorm(loss, [model[0].bias, towers["b"].bias], retain_graph=True)
        with pytest.raises(ValueError, match=r"batches of 2 and 6 samples; 'c.bias' takes part in none"):
            fastgrad.grad_sqnorm(loss, [towers["c"].bias])
    assert (a.shape, b.shape) == ((6,), (2,))


def test_a_parameter_of_two_recorded_models(model: nn.Sequential) -> None:
    other = nn.Sequential(model[0], nn.ReLU())
    with fastgrad.record(model), fastgrad.record(other):
        loss = model(X).sum() + other(X).sum()
        (found,) = fastgrad.grad_sqnorm(loss, [model[0].weight])
    truth = loss_norms((model(x).sum() + other(x).sum() for x in X.split(1)), model)
    torch.testing.assert_close(found, truth[:, 0])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_and_pickles(model: nn.Sequential, copied: Callable[[Any], Any]) -> None:
    """They do what the original does, also those made in the middle of its work, which they take no part in."""
    extractor, noise = fastgrad.GradientFeatures(model, log=True), fastgrad.NoiseScale()
    truth = extractor(X)[1]
    noise.update(truth.exp().sum(1), 1e-9)
    assert torch.equal(copied(extractor)(X)[1], truth)
    assert copied(noise).scale == noise.scale
    limits = {"0": 0.5, "2": 0.1}
    for make in (fastgrad.record, lambda model: fastgrad.clip_gradients(model, limits)):
        with make(model) as recording:
            model(X)
            other = copied(recording)
        with other:
            loss = F.cross_entropy(other.model(X), Y, reduction="none")
            norms = fastgrad.grad_sqnorm(loss.sum(), list(other.model.parameters()), retain_graph=True)
            if isinstance(other, fastgrad.clip_gradients):
                joined = torch.stack(norms, 1).unflatten(1, (2, 2)).sum(2).sqrt()
                torch.testing.assert_close(other.backward(loss), joined)


class Scaled(nn.Sequential):
    """Changes what it is given, and what it gives, around its ``forward``."""

    def __call__(self, x: Tensor) -> Any:
        return super().__call__(1.5 * x) * 2


#: What is done to all modules: how it is registered, and what it does.
GLOBAL: dict[str, tuple[Any, Any]] = {
    "none": (lambda hook: module.register_module_forward_hook(hook), lambda *_: None),
    "output": (module.register_module_forward_hook, lambda _, __, output: 1.5 * output),
    "input": (module.register_module_forward_pre_hook, lambda _, args: (1.5 * args[0],)),
    "gradient": (module.register_module_full_backward_pre_hook, lambda _, grads: tuple(2 * g for g in grads)),
}


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("kind", GLOBAL)
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_done_around_a_forward_is_done_once(model: nn.Sequential, kind: str, *, scaled: bool) -> None:
    register, hook = GLOBAL[kind]
    model = Scaled(*model) if scaled else model
    handle = register(hook)
    try:
        truth = true_norms(model, (X,), lambda i, z: 2 * z)
        with fastgrad.record(model):
            output = model(X)
            found = fastgrad.grad_sqnorm(output.square().sum(), list(model.parameters()))
        torch.testing.assert_close(output, model(X))
    finally:
        handle.remove()
    torch.testing.assert_close(torch.stack(found, 1), truth)


def test_a_loss_may_be_computed_in_another_thread(model: nn.Sequential) -> None:
    truth = true_norms(model, (X,), lambda i, z: 2 * z)

    def found() -> Tensor:
        with ThreadPoolExecutor(1) as pool, fastgrad.record(model):
            output = model(X)
            loss = pool.submit(lambda: output.square().sum()).result()
            return torch.stack(fastgrad.grad_sqnorm(loss, list(model.parameters())), 1)

    with ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(pool.submit(found).result(), truth)
