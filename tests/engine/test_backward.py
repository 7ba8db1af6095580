"""Several passes back through one forward pass, each to the sites that it asks for."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms
from small_nets import Net
from torch import Tensor, nn

import fastgrad
from fastgrad.engine.backward import backward_signals, probe_grads
from fastgrad.engine.layout import Layout
from fastgrad.engine.network import Network
from fastgrad.engine.run import LayerSite, Run, Site
from fastgrad.layers import LayerRule, find_rule

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 2, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(45, 3),
    )  # fmt: skip
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return net.double().eval()


def counting(model: nn.Module, path: str, count: Counter[str]) -> LayerSite:
    """A layer's site that counts how often its rule runs."""
    layer = model.get_submodule(path)
    rule, _ = find_rule(layer)
    assert isinstance(rule, LayerRule)

    def function(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        count[path] += 1
        return dict(rule.function(module, a, g))

    names = {f"{path}.{name}": name for name, _ in layer.named_parameters()}
    return LayerSite(path, tuple(names), names, Layout("plain"), LayerRule(rule.name, function, in_place=rule.in_place))


def forward(model: nn.Module, sites: list[Site]) -> tuple[Run, Tensor]:
    network, run = Network(model), Run(len(X))
    plan = replace(network.plan((X,), {}, len(X)), sites=tuple(sites))
    with torch.no_grad():
        output, _ = network.once(plan, run, ((X,), {}))
    return run, output


def norms(model: nn.Module, gradient: Tensor) -> Tensor:
    return loss_norms(((model(x[None]) * g).sum() for x, g in zip(X, gradient, strict=True)), model)


def test_each_pass_computes_what_it_asks_for_and_no_more(model: nn.Sequential) -> None:
    count: Counter[str] = Counter()
    layers = ("0", "1", "3", "4", "7")
    run, logits = forward(model, [counting(model, path, count) for path in layers])
    probes = {site.path: (site, probe) for site, probe in run.probes}
    gradients = torch.randn(2, 4, 3, dtype=torch.float64)
    true = torch.stack([norms(model, g) for g in gradients])
    names = [name for name, _ in model.named_parameters()]
    for asked in (["4"], ["1", "7"], ["0"], []):
        count.clear()
        run.probes = [probes[path] for path in asked]
        found = backward_signals(run, [logits], [gradients], keep=True)
        assert set(count) == set(asked)
        expected = true * torch.tensor([name.split(".")[0] in asked for name in names])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    run.probes = list(probes.values())
    torch.testing.assert_close(backward_signals(run, [logits], [gradients]), true, rtol=1e-10, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        backward_signals(run, [logits], [gradients])


def test_a_pass_stops_at_the_earliest_site_asked_for(model: nn.Sequential) -> None:
    run, logits = forward(model, [counting(model, path, Counter()) for path in ("0", "4", "7")])
    passed: list[str] = []
    pending, seen = [logits.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        node.register_hook(functools.partial(lambda name, *_: passed.append(name), node.name()))
        pending += [following for following, _ in node.next_functions]
    gradient = torch.ones(1, 4, 3, dtype=torch.float64)
    for probes, convolutions in ((run.probes[1:], 0), (run.probes[:1], 1)):
        probe_grads([logits], [probe for _, probe in probes], [gradient], batched=True, keep=True)
        assert sum("Convolution" in name for name in passed) == convolutions


def test_two_rules_at_one_layer(model: nn.Sequential) -> None:
    count: Counter[str] = Counter()
    run, logits = forward(model, [counting(model, "1", count), counting(model, "1", count)])
    probes = [probe for _, probe in run.probes]
    first, second = probe_grads([logits], probes, [torch.randn(1, 4, 3, dtype=torch.float64)], batched=True)
    assert first.all()
    assert torch.equal(first, second)


def test_outputs_and_probes_that_do_not_meet(model: nn.Sequential) -> None:
    run, logits = forward(model, [counting(model, "1", Counter())])
    gradients = torch.ones(2, 4, 3, dtype=torch.float64)
    zeros = torch.zeros(2, 4, len(list(model.parameters())), dtype=torch.float64)
    assert torch.equal(backward_signals(run, [logits.detach()], [gradients]), zeros)
    other = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True) * 1
    assert torch.equal(backward_signals(run, [other], [gradients], keep=True), zeros)
    assert probe_grads([other], [run.probes[0][1]], [gradients], batched=True, keep=True) == [None]


def test_an_ordinary_backward_pass_computes_no_norms(model: nn.Sequential) -> None:
    count: Counter[str] = Counter()
    run, logits = forward(model, [counting(model, "0", count)])
    logits.sum().backward()
    assert not count
    assert run.probes[0][1].grad is None


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos() if g.abs().max().item() > 0 else g


@pytest.mark.parametrize(
    "function",
    [lambda net, h: torch.cdist(h[:, None], net.rows.expand(len(h), 4, 4))[:, 0], lambda _, h: Sine.apply(h)],
)
def test_several_gradients_through_functions_that_take_one_at_a_time(function: Callable[[Any, Tensor], Tensor]) -> None:
    """``torch.vmap`` is silently wrong for the gradients of ``cdist``, and refuses what looks at values."""
    torch.manual_seed(0)
    rows, layers = nn.Parameter(torch.randn(4, 4)), nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 3)])
    model = Net(lambda net, x: net.layers[1](function(net, net.layers[0](x))), layers=layers, rows=rows).double()
    x, gradients = torch.randn(6, 5, dtype=torch.float64), torch.rand(2, 6, 3, dtype=torch.float64)
    with fastgrad.record(model):
        z, parameters = model(x), list(model.parameters())
        found = fastgrad.grad_sqnorm(z, parameters, grad_outputs=gradients, is_grads_batched=True)
    for norms, at in zip(torch.stack(found, 2), gradients, strict=True):
        truth = loss_norms(((model(one[None]) * g).sum() for one, g in zip(x, at, strict=True)), model)
        torch.testing.assert_close(norms, truth, rtol=1e-9, atol=1e-12)
    _, contrasts = fastgrad.GradientFeatures(model, loss="mse", target="contrast")(x)
    for number in range(3):
        _, alone = fastgrad.GradientFeatures(model, loss="mse", target=number)(x)
        torch.testing.assert_close(contrasts[:, number], alone)
