"""Models whose path depends on an argument, on state, on data or on a length: exact on every call, or refused."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastgrad

Call = tuple[tuple[Any, ...], dict[str, Any]]


def loop(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``(B, P)``: squared norms of the gradients of each row of the output's sum of squares, along the batch's path."""
    return loss_norms((row.square().sum() for row in model(*args, **kwargs)), model)


def recorded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with fastgrad.record(model):
        loss = model(*args, **kwargs).square().sum()
        return torch.stack(fastgrad.grad_sqnorm(loss, list(model.parameters())), 1)


def check(model: nn.Module, calls: Iterable[Call], *, prepare: Callable[[int], None] = lambda _: None) -> None:
    """Every call, by recording, by features and by features of chunks, against the loop."""
    model = model.double().eval()
    extractors = [
        fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z), chunk_size=size)
        for size in (None, 2)
    ]
    for number, (args, kwargs) in enumerate(calls):
        prepare(number)
        truth = loop(model, args, kwargs)
        torch.testing.assert_close(recorded(model, args, kwargs), truth, rtol=1e-9, atol=1e-12)
        for extractor in extractors:
            torch.testing.assert_close(extractor(*args, **kwargs)[1], truth, rtol=1e-9, atol=1e-12)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Modes(nn.Module):
    """Two layers, of which an argument, an attribute or the data chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.mode: Any = "a"

    def forward(self, x: Tensor, mode: Any = None) -> Tensor:
        mode = self.mode if mode is None else mode
        if mode == "functional":
            return self.head(F.linear(x, self.a.weight).tanh())
        return self.head(self.a(x).tanh() if mode in ("a", 0) else self.b(x).tanh())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("modes", ["abab", [0, 1, 0, 1], ["a", "functional", "b", "a", "functional"]])
def test_an_argument_chooses(modes: Any) -> None:
    check(Modes(), [((inputs(5, 3, seed=i),), {"mode": mode}) for i, mode in enumerate(modes)])


@pytest.mark.parametrize("modes", ["abab", ["a", "functional", "b", "a", "functional"]])
def test_an_attribute_chooses(modes: Any) -> None:
    model = Modes()

    def prepare(number: int) -> None:
        model.mode = modes[number]

    check(model, [((inputs(5, 3, seed=i),), {}) for i in range(len(modes))], prepare=prepare)


class Deeper(nn.Module):
    """Another layer where a value is large, and a scale that only those calls use."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.first, self.more, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.rand(3))
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if x.abs().max() > 100:
            h = torch.tanh(self.more(h))
            if self.scaled:
                h = h * self.scale
        return self.head(h)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("place", [0, 5])
def test_the_data_choose(scaled: bool, place: int) -> None:
    x = inputs(6, 3)
    large = x.clone()
    large[place, 0] = 200.0
    model = Deeper(scaled).double().eval()
    extractor = fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z))
    for batch in (x, large, x, large):
        truth = loop(model, (batch,), {})
        torch.testing.assert_close(recorded(model, (batch,), {}), truth, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(extractor(batch)[1], truth, rtol=1e-9, atol=1e-12)


class Unrolled(nn.Module):
    """One layer for every step of a sequence ``(B, T, 3)``."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            step = self.cell
            h = torch.tanh(step(h + x[:, t])) if isinstance(step, nn.Linear) else step(x[:, t], h)
        return self.head(h)


@pytest.mark.parametrize("cell", [nn.Linear(3, 3), nn.GRUCell(3, 3)])
@pytest.mark.parametrize("lengths", [(1, 4, 2), (1, 3), (3, 1, 5)])
def test_a_length_chooses(cell: nn.Module, lengths: tuple[int, ...]) -> None:
    check(Unrolled(cell), [((inputs(5, length, 3),), {}) for length in lengths])


class Exits(nn.Module):
    """Layers of which a call takes the first few, with an optional auxiliary head on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        self.auxiliary, self.head = nn.Linear(3, 2), nn.Linear(3, 2)
        self.depth, self.helped = 4, False

    def forward(self, x: Tensor) -> Tensor:
        extra: Tensor | float = 0.0
        for i, layer in enumerate(self.layers[: self.depth]):
            x = torch.tanh(layer(x))
            if self.helped and i == 0:
                extra = self.auxiliary(x)
        return self.head(x) + extra


def test_early_exits_and_optional_heads() -> None:
    model = Exits()

    def prepare(number: int) -> None:
        model.depth, model.helped = [(2, False), (4, False), (1, True), (4, True), (2, False)][number]

    check(model, [((inputs(5, 3),), {})] * 5, prepare=prepare)


class Bare(nn.Module):
    """A parameter that calls broadcast, multiply with, or leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head, self.way = nn.Parameter(torch.rand(3)), nn.Linear(3, 2), "mul"

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "mul":
            x = x * self.scale
        elif self.way == "sum":
            x = x * self.scale.sum()
        elif self.way == "matmul":
            x = x * (x @ self.scale).unsqueeze(1)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("ways", [("mul", "sum", "matmul", "none", "mul"), ("none", "mul", "none", "sum")])
def test_bare_parameters_under_a_branch(ways: tuple[str, ...]) -> None:
    model = Bare()

    def prepare(number: int) -> None:
        model.way = ways[number]

    check(model, [((inputs(5, 3),), {})] * len(ways), prepare=prepare)


class Dropped(nn.Module):
    """Drops layers in training mode, by Python's generator or PyTorch's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 2)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or self.draw() > 0.5:
                x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(()))])
def test_dropped_layers(draw: Callable[[], float]) -> None:
    model = Dropped(draw).double().train()
    x = inputs(5, 3)
    for seed in range(12):
        random.seed(seed)
        torch.manual_seed(seed)
        truth = loop(model, (x,), {})
        after = random.random(), float(torch.rand(()))
        random.seed(seed)
        torch.manual_seed(seed)
        found = recorded(model, (x,), {})
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
        # A user's own draws go on as if nothing had been recorded.
        assert (random.random(), float(torch.rand(()))) == after


class Squared(torch.autograd.Function):
    """A function whose arguments Python's protocol for subclasses does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return g * weight * weight, (2 * g * x * weight).sum(0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head, self.on = nn.Parameter(torch.rand(3)), nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        if self.on:
            x = Squared.apply(x, self.weight)
        return self.head(x)


def test_a_function_of_autograd_under_a_branch() -> None:
    model = Custom()

    def prepare(number: int) -> None:
        model.on = number in (1, 3)

    check(model, [((inputs(5, 3),), {})] * 4, prepare=prepare)


class Checkpointed(Modes):
    def forward(self, x: Tensor, mode: Any = None) -> Tensor:
        return checkpoint(super().forward, x, mode, use_reentrant=False)


def test_checkpointing() -> None:
    model = Checkpointed().double().eval()
    for mode in ("a", "b", "functional", "a"):
        x = inputs(4, 3)
        torch.testing.assert_close(recorded(model, (x, mode), {}), loop(model, (x, mode), {}), rtol=1e-9, atol=1e-12)


def test_clipping_and_ranking() -> None:
    model = Modes().double().eval()
    for mode in ("a", "b", "functional"):
        model.mode = mode
        x, y = inputs(5, 3), torch.tensor([0, 1, 1, 0, 1])
        truth = loss_norms(F.cross_entropy(model(x), y, reduction="none"), model).sum(1).sqrt()
        with fastgrad.clip_gradients(model, 1.0) as clipped:
            norms = clipped.backward(F.cross_entropy(model(x), y, reduction="none"))
        torch.testing.assert_close(norms, truth)
        table = fastgrad.rank_samples(model, [(x, y)], verbose=False)
        torch.testing.assert_close(torch.from_numpy(table.grand), truth)


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_of_the_present_path(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled:
        monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
        monkeypatch.setattr("fastgrad.engine.tracing.require_cpp_compiler", lambda _: None)
    model, x = Modes().double().eval(), inputs(5, 3)
    extractor = fastgrad.GradientFeatures(model, compile=compiled)
    plain = fastgrad.GradientFeatures(model)
    for mode in ("a", "b", "functional", "a"):
        model.mode = mode
        found = extractor(x) if compiled else extractor.trace(x)(x)
        torch.testing.assert_close(found, plain(x))


def test_a_graph_cannot_follow_the_data() -> None:
    extractor = fastgrad.GradientFeatures(Deeper(False).double().eval())
    with pytest.raises(ValueError, match="values of its inputs"):
        extractor.trace(inputs(4, 3))


class Transposed(nn.Module):
    """One layer before or after its batch was moved."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, moved: bool) -> Tensor:
        h = self.layer(x.transpose(0, 1)).transpose(0, 1) if moved else self.layer(x)
        return self.head(torch.tanh(h).mean(1))


def test_the_batch_in_another_place() -> None:
    calls: list[Call] = [((inputs(4, 6, 3), moved), {}) for moved in (False, True, False, True)]
    check(Transposed(), [*calls, ((inputs(6, 6, 3), True), {}), ((inputs(6, 6, 3), False), {})])


class Told(nn.Module):
    """One layer before or after its batch was moved, which one equation says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.moved = nn.Linear(3, 3), nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("btd->tbd" if self.moved else "btd->btd", x)
        return self.head(torch.einsum("tbd->bd" if self.moved else "btd->bd", torch.tanh(self.layer(h))))


def test_an_equation_moves_the_batch() -> None:
    model = Told()

    def prepare(number: int) -> None:
        model.moved = number == 1

    check(model, [((inputs(6, 6, 3),), {})] * 3, prepare=prepare)


class Hooked(nn.Module):
    """A layer whose gradients a hook may divide by the largest in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.on = nn.Linear(3, 3), nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.on:
            h.register_hook(lambda g: g / g.abs().max())
        return self.head(torch.tanh(h))


def test_a_later_hook_where_gradients_alone_pass() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 2)).double()
    extractor = fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z))
    extractor(inputs(5, 3))

    def triple(_: nn.Module, __: Any, output: Tensor) -> None:
        # Without gradients of parameters the forward pass does not come to it; what is computed again does.
        if output.requires_grad:
            output.register_hook(lambda g: 3 * g)

    layer.register_forward_hook(triple)
    with pytest.raises(ValueError, match="disagree with autograd"):
        extractor(inputs(5, 3))


def test_a_hook_under_a_branch_is_refused_where_samples_meet() -> None:
    model = Hooked().double().eval()
    extractor = fastgrad.GradientFeatures(model)
    check(model, [((inputs(5, 3),), {})])
    extractor(inputs(5, 3))
    model.on = True
    for call in (lambda: recorded(model, (inputs(5, 3),), {}), lambda: extractor(inputs(5, 3))):
        with pytest.raises(ValueError, match=r"gradients of .* change with the other samples"):
            call()


class Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.flip(0))).flip(0))


class Sorted(nn.Module):
    """Works through its samples in the order of their lengths."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[..., 0].flatten(1).sum(1).argsort()
        h = self.body(x[order])
        h = h[0] if isinstance(h, tuple) else h
        return self.head(torch.tanh(h[order.argsort()]).mean(1))


@pytest.mark.parametrize("model", [Sorted(nn.Linear(3, 3)), Sorted(nn.LSTM(3, 3, batch_first=True))])
def test_samples_in_another_order(model: nn.Module) -> None:
    ordered = inputs(5, 2, 3)
    ordered = ordered[ordered[..., 0].sum(1).argsort()]
    check(model, [((ordered,), {}), ((ordered.flip(0),), {}), ((inputs(5, 2, 3),), {})])


def test_samples_in_reverse() -> None:
    check(Reversed(), [((inputs(5, 3),), {})])


class Gated(nn.Module):
    """Two experts, of which every sample uses one, on samples in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flip(0)
        gate = (x[:, :1] > 0).to(x.dtype)
        return (gate * self.experts[0](x) + (1 - gate) * self.experts[1](x)).flip(0)


def test_an_expert_that_the_first_call_does_not_use_serves_samples_in_reverse() -> None:
    check(Gated(), [((inputs(1, 3),), {}), ((inputs(5, 3, seed=1),), {})])


class Counted(nn.Module):
    """Scales its input by how often it was called, over the steps of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(4, 4), 0

    def step(self, x: Tensor) -> Tensor:
        self.count += 1
        return torch.tanh(self.layer(x * (1 + self.count % 2)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.step(x[:, t]) for t in range(x.shape[1])], 1)


def test_what_is_computed_again_has_the_attributes_that_the_call_began_with() -> None:
    model, x = Counted().double(), inputs(3, 3, 4)
    for _ in range(2):
        truth = loop(copy.deepcopy(model), (x,), {})
        torch.testing.assert_close(recorded(model, (x,), {}), truth, rtol=1e-9, atol=1e-12)
    assert model.count == 6


class Counting(nn.Module):
    """Counts large batches in a buffer, within a checkpoint, whose backward pass runs it again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def part(self, x: Tensor) -> Tensor:
        if len(x) > 3:
            self.count += 1
        return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


def test_planning_changes_no_buffer() -> None:
    # Planning runs more samples than the call has.
    model, x = Counting().double().eval(), inputs(2, 3)
    truth = loop(model, (x,), {})
    torch.testing.assert_close(recorded(model, (x,), {}), truth, rtol=1e-9, atol=1e-12)
    assert float(model.count) == 0


def test_a_mode_of_the_users_sees_the_functions_of_layers() -> None:
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double().eval(), inputs(5, 3)
    expected = recorded(model, (x,), {})
    with Watch():
        found = recorded(model, (x,), {})
    assert {F.linear, F.relu} <= set(seen)
    assert torch.equal(found, expected)


def test_a_pass_leaves_no_copy_for_the_garbage_collector() -> None:
    copies = []
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(5, 3)
    model[1].register_forward_hook(lambda layer, *_: copies.append(weakref.ref(layer)))
    extractor = fastgrad.GradientFeatures(model)
    extractor(x)
    gc.collect()
    gc.disable()
    try:
        copies.clear()
        extractor(x)
        assert copies
        assert all(ref() is None for ref in copies)
    finally:
        gc.enable()


class Closure(nn.Module):
    def __init__(self, outer: nn.Linear) -> None:
        super().__init__()
        self.outer, self.head, self.on = outer, nn.Linear(3, 2), False
        self.function = lambda x: F.linear(x, outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x) if self.on else x)


def test_a_parameter_out_of_reach_under_a_branch_is_refused() -> None:
    model, x = Closure(nn.Linear(3, 3)).double().eval(), inputs(5, 3)
    extractor = fastgrad.GradientFeatures(model)
    extractor(x)
    model.on = True
    with pytest.raises(ValueError, match=r"'outer.weight'.*attribute of one of its modules"):
        extractor(x)
