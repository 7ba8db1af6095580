from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastgrad.deploy.file import graph as unroll
from fastgrad.gradients.features import GradientFeatures


def gradient_norms(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and, by autograd, each sample's squared norm of the input's gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = net(x)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient.flatten(1).square().sum(1)


def network(seed: int) -> nn.Module:
    """Batch norms with every statistic away from its initial value."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3),
        nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3),
    )  # fmt: skip
    for module in net:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.2, 2.0)
    return net.eval()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_both_ways_give_what_the_function_gives(one_by_one: bool, seed: int) -> None:
    net = network(seed).double()
    example = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    program = unroll.trace(lambda x: gradient_norms(net, x), example, one_by_one=one_by_one, max_batch=64)
    assert any("while_loop" in str(node.target) for node in program.graph.nodes) == one_by_one
    for batch in (1, 2, 5, 64):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
        for ours, expected in zip(program.module()(x), gradient_norms(net, x), strict=True):
            # Sums of some hundred terms, in another order for another number of rows.
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [1, 2, 1024])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_batch_is_recorded_whatever_the_largest_is(one_by_one: bool, most: int) -> None:
    net = network(0)
    program = unroll.trace(lambda x: (net(x).detach(),), torch.zeros(1, 3, 8, 8), one_by_one=one_by_one, max_batch=most)
    x = torch.randn(min(most, 3), 3, 8, 8)
    torch.testing.assert_close(*program.module()(x), net(x).detach(), rtol=1e-5, atol=1e-6)


def test_constants_may_share_memory() -> None:
    """As halves of one tensor, or one under two names; a loop's body takes none that do."""
    both = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    halves, again = both.unbind(), both[0].view(3)
    x = torch.randn(4, 3)

    def function(x: Tensor) -> tuple[Tensor]:
        return ((x * halves[0] + halves[1]) * again,)

    (found,) = unroll.trace(function, x, one_by_one=True).module()(x)
    assert torch.equal(found, *function(x))


def test_the_model_keeps_its_parameters() -> None:
    net = network(0)
    before = {name: (value, value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    unroll.trace(lambda x: gradient_norms(net, x), torch.zeros(1, 3, 8, 8), one_by_one=True)
    for name, value in net.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])


def test_the_loop_is_for_large_inputs_with_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(0)

    def loops(function: object) -> bool:
        program = unroll.trace(function, torch.zeros(1, 3, 8, 8))  # type: ignore[arg-type]
        return any("while_loop" in str(node.target) for node in program.graph.nodes)

    assert not loops(lambda x: gradient_norms(net, x))
    monkeypatch.setattr(unroll, "LOOP_BYTES", 1000)
    assert loops(lambda x: gradient_norms(net, x))
    assert not loops(lambda x: net(x).detach())


def test_bytes_written_count_results_but_not_views() -> None:
    graph = torch.fx.symbolic_trace(lambda x: (x + 1).view(6).relu())
    x = torch.zeros(2, 3)
    plus = x + 1
    for node, value in zip(graph.graph.nodes, (x, plus, plus.view(6), torch.zeros(6), None), strict=True):
        node.meta["val"] = value
    for node in graph.graph.nodes:
        if node.op == "call_method":
            node.op = "call_function"
    assert unroll.written(graph) == 2 * 6 * 4


@pytest.mark.parametrize("one_by_one", [pytest.param(False, marks=pytest.mark.slow), True])
def test_signals_of_a_network_with_attention(one_by_one: bool) -> None:
    """Its rule differentiates within the backward pass, which batched tensors do not allow a tracer to follow."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))

    extractor = GradientFeatures(Model().double().eval(), signals=[("bce", "ones"), ("cross_entropy", "predicted")])
    example = torch.randn(2, 5, 8, dtype=torch.float64)
    extractor(example)
    program = unroll.trace(extractor, example, one_by_one=one_by_one)
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    for ours, expected in zip(program.module()(x), extractor(x), strict=True):
        # The key's bias has gradient zero but for rounding: eps squared beside the others' squares.
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-24)
