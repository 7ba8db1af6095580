from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastgrad.deploy.file import graph as unroll


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
def test_graph_equals_function(seed: int) -> None:
    net = network(seed).double()
    example = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    program = unroll.trace(lambda x: gradient_norms(net, x), example, max_batch=64)
    for batch in (1, 2, 5, 64):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
        for ours, expected in zip(program.module()(x), gradient_norms(net, x), strict=True):
            # Sums of some hundred terms, in another order for another number of rows.
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [1, 2, 1024])
def test_any_largest_batch(most: int) -> None:
    net = network(0)
    program = unroll.trace(lambda x: (net(x).detach(),), torch.zeros(1, 3, 8, 8), max_batch=most)
    x = torch.randn(min(most, 3), 3, 8, 8)
    torch.testing.assert_close(*program.module()(x), net(x).detach(), rtol=1e-5, atol=1e-6)


def test_the_model_keeps_its_parameters() -> None:
    net = network(0)
    before = {name: (value, value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    unroll.trace(lambda x: gradient_norms(net, x), torch.zeros(1, 3, 8, 8))
    for name, value in net.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
