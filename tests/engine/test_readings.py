"""What modules see comes back in the order of the batch's rows, bit for bit as in the plain forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgrad
from fastgrad.engine.network import Network
from fastgrad.engine.run import Reading, Run
from fastgrad.layers import register_rule


class Wrong(nn.Linear):
    """A layer whose rule disagrees with autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@register_rule(Wrong, name="wrong")
def wrong(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    return dict.fromkeys(("weight", "bias"), g.square().sum(1) + 1)


class Unmappable(nn.Module):
    """Falls back at the root, one sample after another: ``vmap`` refuses ``.item()``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Wrong(5, 6)
        self.second = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.second(h)) * self.scale
        if h.sum().item() == torch.inf:
            h = h + 1
        out: Tensor = self.head(h)
        return out


def entering(inputs: tuple[Any, ...], _: Any) -> Tensor:
    value: Tensor = inputs[0]
    return value


def leaving(_: tuple[Any, ...], output: Any) -> Tensor:
    value: Tensor = output
    return value


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


@pytest.mark.parametrize("signals", [[("bce", "ones")], [("bce", "ones"), ("mse", 1)]])
@pytest.mark.parametrize("samples", [1, 4, 7])
def test_fallback_at_the_root_in_chunks_of_every_size(samples: int, signals: list[tuple[str, Any]]) -> None:
    torch.manual_seed(samples)
    model = Unmappable().double().eval()
    x = torch.randn(samples, 5, dtype=torch.float64)
    readings = [Reading("head", entering), Reading("second", leaving), Reading("", leaving)]
    for chunk in range(1, samples + 1):
        extractor = fastgrad.GradientFeatures(model, signals=signals, chunk_size=chunk)
        logits, _, found = extractor.extract((x,), {}, readings=readings)
        routes = {r.parameter: (r.route, r.module) for r in extractor.report()}
        assert routes["first.weight"] == routes["first.bias"] == ("fallback", "")
        parts = [plain(model, part, "head") for part in x.split(chunk)]
        h = torch.cat([part[1] for part in parts])
        second = torch.cat([plain(model, part, "second")[2] for part in x.split(chunk)])
        assert torch.equal(logits, torch.cat([part[0] for part in parts]))
        assert torch.equal(found[readings[0]], h)
        assert torch.equal(found[readings[1]], second)
        assert torch.equal(found[readings[2]], logits)


class Nested(nn.Module):
    """Calls one module twice, and one by keyword; a later operation overwrites an output."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.table = nn.Parameter(torch.rand(1, 4))
        self.head = nn.Linear(4, 3)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.block(x) + self.table)
        h.mul_(2)
        out: Tensor = self.head(input=h)
        return out


def nested() -> Nested:
    torch.manual_seed(3)
    return Nested().eval()


def test_nested_and_repeated_calls() -> None:
    model, x = nested(), torch.randn(5, 4)
    readings = [
        Reading("block", entering), Reading("block", leaving), Reading("block.0", leaving), Reading("head", entering),
    ]  # fmt: skip
    logits, _, found = fastgrad.GradientFeatures(model).extract((x,), {}, readings=readings)
    assert set(found) == set(readings)
    with torch.no_grad():
        second = model.block(x) + model.table
        between = model.block[0](second)
        after = model.block[1](between)
        assert torch.equal(logits, model(x))
    for reading, expected in zip(readings, (second, after, between, 2 * after), strict=True):
        assert torch.equal(found[reading], expected)
        assert not found[reading].requires_grad


def test_every_way_through_the_engine_reads_the_same() -> None:
    model, x = nested(), torch.randn(6, 4)
    reading = Reading("block.1", lambda _, out: torch.stack([out.sum(1), out.square().sum(1)], 1))
    run = Run(6)
    with torch.no_grad():
        logits = Network(model).forward(None, run, (x,), {}, readings=[reading])
    assert run.probes == []
    assert torch.equal(logits, model(x))
    for options in ({}, {"target": "contrast"}, {"layers": "head"}, {"signals": [("bce", "ones")] * 2}):
        _, features, found = fastgrad.GradientFeatures(model, **options).extract((x,), {}, readings=[reading])  # type: ignore[arg-type]
        assert torch.equal(found[reading], run.readings[reading])
        assert torch.equal(features, fastgrad.GradientFeatures(model, **options)(x)[1])  # type: ignore[arg-type]


def test_an_empty_batch_has_readings_without_rows() -> None:
    model = nested()
    reading = Reading("block", leaving)
    logits, features, found = fastgrad.GradientFeatures(model).extract(
        (torch.zeros(0, 4),), {}, readings=[reading]
    )
    assert logits.shape == (0, 3)
    assert features.shape == (0, 9)
    assert found[reading].shape == (0, 4)


def test_what_cannot_be_read() -> None:
    extractor, x = fastgrad.GradientFeatures(nested()), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="did not call 'idle'"):
        extractor.extract((x,), {}, readings=[Reading("idle", leaving)])
    with pytest.raises(AttributeError, match="tail"):
        extractor.extract((x,), {}, readings=[Reading("tail", leaving)])
    for function, was in ((lambda _, out: out.sum(), r"\(\)"), (lambda _, out: out[:2], r"\(2, 3\)")):
        with pytest.raises(ValueError, match=f"'head' must be .* each of 3 samples; it was {was}"):
            extractor.extract((x,), {}, readings=[Reading("head", function)])
    with pytest.raises(ValueError, match="it was NoneType"):
        extractor.extract((x,), {}, readings=[Reading("head", lambda *_: None)])  # type: ignore[arg-type,return-value]


def test_hooks_of_the_user_come_after_the_reading() -> None:
    model, x = nested(), torch.randn(3, 4)
    model.block.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))
    model.block.register_forward_hook(lambda _m, _a, out: 2 * out)
    readings = [Reading("block.0", entering), Reading("block.1", leaving), Reading("block", leaving)]
    _, _, found = fastgrad.GradientFeatures(model).extract((x,), {}, readings=readings)
    with torch.no_grad():
        inside = model.block(x) + model.table + 1
    assert torch.equal(found[readings[0]], inside)
    assert torch.equal(found[readings[2]], found[readings[1]])


def test_traced_and_compiled() -> None:
    from torch._dynamo import reset

    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)
    )
    torch.manual_seed(0)
    model = model.double().eval()
    extractor = fastgrad.GradientFeatures(model, signals=[("bce", "ones"), ("mse", "ones")])
    readings = [Reading("4", entering), Reading("1", lambda _, out: out.sum((2, 3)))]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        logits, features, found = extractor.extract((x,), {}, readings=readings)
        return (logits, features, *(found[reading] for reading in readings))

    from fastgrad.deploy.file.graph import trace

    example = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    function(example)
    program = trace(function, example, one_by_one=False).module()
    reset()
    compiled = torch.compile(function, backend="eager")
    for samples in (1, 4):
        x = torch.randn(samples, 2, 5, 5, dtype=torch.float64)
        expected = function(x)
        _, _, normed = plain(model, x, "1")
        assert torch.equal(expected[2], plain(model, x, "4")[1])
        assert torch.equal(expected[3], normed.sum((2, 3)))
        for graph in (program, compiled):
            for found, true in zip(graph(x), expected, strict=True):
                torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)
