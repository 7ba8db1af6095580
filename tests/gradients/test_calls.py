"""What else happens to a recorded model: towers, copies, hooks, tensors left elsewhere, transforms, threads."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms
from small_nets import Net, assert_exact, recorded
from torch import Tensor, nn
from torch.nn.modules import module
from torch.utils.hooks import RemovableHandle

import fastgrad

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 1, 0, 1, 1])


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


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
            out = model(X)
            other = copied(recording)
            if isinstance(recording, fastgrad.clip_gradients):
                recording.backward(out.sum(1))
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


#: Hooks of a module, or of all; each works once.
HOOKS: dict[str, Callable[[nn.Module], RemovableHandle]] = {
    "input": lambda part: part.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "output": lambda part: part.register_forward_hook(lambda *call: 3 * call[-1], with_kwargs=True),
    "gradient of the input": lambda part: part.register_full_backward_hook(lambda _, given,
        __: tuple(None if g is None else -2 * g for g in given)),
    "gradient of the output": lambda part: part.register_full_backward_pre_hook(lambda _, given: (3 * given[0],)),
    "input of all": lambda _: module.register_module_forward_pre_hook(lambda _, args: (1.5 * args[0],)),
    "output of all": lambda _: module.register_module_forward_hook(lambda _, __, output: 1.5 * output),
    "gradient of all": lambda _: module.register_module_full_backward_pre_hook(lambda _, given: (2 * given[0],)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("place", ["", "0", "2"])
@pytest.mark.parametrize("kind", HOOKS)
def test_what_is_done_around_a_forward_is_done_once(model: nn.Sequential, place: str, kind: str) -> None:
    model = Scaled(*model) if place == "2" else model
    handle = HOOKS[kind](model.get_submodule(place))
    try:
        outside = model(X)
        truth = loss_norms((out.square().sum() for out in outside.split(1)), model)
        with fastgrad.record(model):
            inside = model(X)
            found = fastgrad.grad_sqnorm(inside.square().sum(), list(model.parameters()))
    finally:
        handle.remove()
    torch.testing.assert_close(inside, outside)
    assert_exact(torch.stack(found, 1), truth)


def leaking(net: Any, x: Tensor) -> Tensor:
    """Leaves in an attribute what a function without a rule gives, or what follows one with a rule."""
    h = x @ net.weight
    z = net.last(torch.tanh(h))
    net.kept = z * 2 if net.behind else h
    return z


@pytest.mark.parametrize("behind", [False, True])
def test_what_a_module_gives_in_an_attribute(behind: bool) -> None:
    torch.manual_seed(0)
    weight, last = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)
    model = Net(leaking, behind=behind, weight=weight, last=last, kept=None).double()

    def loss(x: Tensor) -> Tensor:
        return model(x).sum() + model.kept.square().sum()

    truth = loss_norms(map(loss, X.split(1)), model)
    for _ in range(2):
        assert_exact(recorded(model, lambda: loss(X)), truth)


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_hook_keeps_outside_of_the_model(model: nn.Sequential, inside: bool) -> None:
    """It is what the recorded call gave, with its gradients; of a first call it is the latest."""
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda _, __, output: kept.append(output if inside else output.detach()))
    for _ in range(2):
        with fastgrad.record(model):
            out = model(X)
            assert kept[-1].shape == (6, 4)
            found = fastgrad.grad_sqnorm(out.sum() + kept[-1].square().sum(), list(model.parameters()))
        rows = ((model(row), kept[-1]) for row in X.split(1))
        assert_exact(torch.stack(found, 1), loss_norms((z.sum() + h.square().sum() for z, h in rows), model))


#: Terms through calls that ``torch.func`` transforms, which have gradients per sample.
TRANSFORMED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda model, x: torch.func.vmap(lambda x: model(x).square().sum())(x),
    "jacrev": lambda model, x: torch.func.jacrev(lambda x: model(x).square().sum())(x),
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
    "functional_call": lambda model, x: torch.func.vmap(lambda x: torch.func.functional_call(model,
        {n: 1 + 2 * p for n, p in model.named_parameters()}, (x,)))(x),
}  # fmt: skip


@pytest.mark.parametrize("way", TRANSFORMED)
def test_a_term_through_a_transformed_call_is_refused(model: nn.Sequential, way: str) -> None:
    """Its gradients per sample are not known."""
    parameters = list(model.parameters())
    with fastgrad.record(model):
        term = TRANSFORMED[way](model, X).square().sum()
        assert len(fastgrad.grad_sqnorm(model(X).sum() + term.detach(), parameters)) == 4
        with pytest.raises(ValueError, match=r"torch\.func transforms"):
            fastgrad.grad_sqnorm(model(X).sum() + term, parameters)


def test_a_transformed_call_on_what_a_recorded_one_gives(model: nn.Sequential) -> None:
    with fastgrad.record(model):
        loss = torch.func.vmap(model[2])(model[1](model[0](X))).square().sum()
        with pytest.raises(ValueError, match=r"losses must depend on '2\.weight' .* torch\.func transforms"):
            fastgrad.grad_sqnorm(loss, model[0].weight)


def test_a_loss_may_be_computed_in_another_thread(model: nn.Sequential) -> None:
    def found() -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return recorded(model, lambda: pool.submit(model(X).square().sum).result())

    truth = loss_norms((out.square().sum() for out in model(X)), model)
    with ThreadPoolExecutor(1) as pool:
        assert_exact(pool.submit(found).result(), truth)


def test_threads_find_out_apart_how_samples_run() -> None:
    """One thread's first run goes on while the other learns that samples of this model have to run one by one."""
    learning, runs = threading.Event(), Counter[int]()

    def forward(net: Net, x: Tensor) -> Tensor:
        out = x * net.computed
        here = threading.get_ident()
        runs[here] += 1
        # The first call of a thread is of the whole batch, the second of the samples together.
        if runs[here] == 2 and not learning.is_set():
            learning.set()
            time.sleep(0.2)
        return out

    torch.manual_seed(0)
    net, x = Net(forward, scale=nn.Parameter(torch.randn(4))).double(), torch.randn(3, 4).double()
    net.computed = net.scale.exp()  # behind which a walk of the graph finds the parameter

    def norms(wait: bool) -> Tensor:
        if wait:
            learning.wait(10)
        with fastgrad.record(net):
            return fastgrad.grad_sqnorm(net(x).square().sum(1), [net.scale])[0].unsqueeze(1)

    truth = loss_norms(net(x).square().sum(1), net)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(norms, [False, True]):
            assert_exact(found, truth)
