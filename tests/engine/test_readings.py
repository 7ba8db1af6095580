"""What modules see comes back in the order of the batch's rows, bit for bit as in the plain forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_nets import Misjudged, Net
from torch import Tensor, nn

from fastgrad.engine.network import Network
from fastgrad.engine.run import Reading, Run


def unmappable(net: Any, x: Tensor) -> Tensor:
    """Falls back at the root, one sample after another: ``vmap`` refuses ``.item()``."""
    h = torch.tanh(net.first(x))
    h = torch.tanh(net.second(h)) * net.scale
    if h.sum().item() == torch.inf:
        h = h + 1
    return net.head(h)


def entering(inputs: tuple[Any, ...], _: Any) -> Tensor:
    return inputs[0]


def leaving(_: tuple[Any, ...], output: Any) -> Tensor:
    return output


def plain(model: nn.Module, x: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the user's own model, input and output of one of its modules."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0].clone(), output.clone()))
    )
    with torch.no_grad():
        logits = model(x)
    handle.remove()
    return (logits, *seen[-1])


def read(model: nn.Module, x: Tensor, *readings: Reading, planned: bool = True) -> tuple[Tensor, dict[Reading, Tensor]]:
    """Logits and readings of one forward pass, with the plan's sites or without."""
    network, run = Network(model), Run(len(x))
    plan = network.plan((x,), {}, len(x)) if planned else None
    with torch.no_grad():
        logits = network.forward(plan, run, (x,), {}, readings=readings)
    assert bool(run.probes) == planned
    return logits, run.readings


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_beside_a_fallback_at_the_root(samples: int) -> None:
    torch.manual_seed(samples)
    layers = {"first": Misjudged(5, 6), "second": nn.Linear(6, 6)}
    model = Net(unmappable, **layers, scale=nn.Parameter(torch.rand(6)), head=nn.Linear(6, 3)).double().eval()
    x = torch.randn(samples, 5, dtype=torch.float64)
    readings = [Reading("head", entering), Reading("second", leaving), Reading("", leaving)]
    logits, found = read(model, x, *readings)
    true, h, _ = plain(model, x, "head")
    assert torch.equal(logits, true)
    assert torch.equal(found[readings[0]], h)
    assert torch.equal(found[readings[1]], plain(model, x, "second")[2])
    assert torch.equal(found[readings[2]], logits)


def nested() -> Net:
    """Calls one module twice, and one by keyword; a later operation overwrites an output."""

    def function(net: Any, x: Tensor) -> Tensor:
        h = net.block(net.block(x) + net.table)
        h.mul_(2)
        return net.head(input=h)

    torch.manual_seed(3)
    block, table = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Parameter(torch.rand(1, 4))
    return Net(function, block=block, table=table, head=nn.Linear(4, 3), idle=nn.Linear(4, 4)).eval()


@pytest.mark.parametrize("planned", [False, True])
def test_nested_and_repeated_calls(planned: bool) -> None:
    model, x = nested(), torch.randn(5, 4)
    readings = [
        Reading("block", entering), Reading("block", leaving), Reading("block.0", leaving), Reading("head", entering),
    ]  # fmt: skip
    logits, found = read(model, x, *readings, planned=planned)
    assert set(found) == set(readings)
    with torch.no_grad():
        second = model.block(x) + model.table
        between = model.block[0](second)
        after = model.block[1](between)
        assert torch.equal(logits, model(x))
    for reading, expected in zip(readings, (second, after, between, 2 * after), strict=True):
        assert torch.equal(found[reading], expected)
        assert not found[reading].requires_grad


def test_what_cannot_be_read() -> None:
    model, x = nested(), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="did not call 'idle'"):
        read(model, x, Reading("idle", leaving))
    with pytest.raises(AttributeError, match="tail"):
        read(model, x, Reading("tail", leaving))
    for function, was in ((lambda _, out: out.sum(), r"\(\)"), (lambda _, out: out[:2], r"\(2, 3\)")):
        with pytest.raises(ValueError, match=f"'head' must be .* each of 3 samples; it was {was}"):
            read(model, x, Reading("head", function))
    with pytest.raises(ValueError, match="it was NoneType"):
        read(model, x, Reading("head", lambda *_: None))  # type: ignore[arg-type,return-value]


def test_hooks_of_the_user_come_after_the_reading() -> None:
    model, x = nested(), torch.randn(3, 4)
    model.block.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))
    model.block.register_forward_hook(lambda _m, _a, out: 2 * out)
    readings = [Reading("block.0", entering), Reading("block.1", leaving), Reading("block", leaving)]
    _, found = read(model, x, *readings)
    with torch.no_grad():
        inside = model.block(x) + model.table + 1
    assert torch.equal(found[readings[0]], inside)
    assert torch.equal(found[readings[2]], found[readings[1]])


def test_traced() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3))
    torch.manual_seed(0)
    model = model.double().eval()
    readings = [Reading("4", entering), Reading("1", lambda _, out: out.sum((2, 3)))]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        run = Run(x.shape[0])
        logits = Network(model).forward(None, run, (x,), {}, readings=readings)
        return (logits.detach(), *(run.readings[reading] for reading in readings))

    from fastgrad.deploy.file.graph import trace

    example = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    function(example)
    program = trace(function, example, one_by_one=False).module()
    for samples in (1, 4):
        x = torch.randn(samples, 2, 5, 5, dtype=torch.float64)
        expected = function(x)
        _, _, normed = plain(model, x, "1")
        assert torch.equal(expected[1], plain(model, x, "4")[1])
        assert torch.equal(expected[2], normed.sum((2, 3)))
        for found, true in zip(program(x), expected, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)
