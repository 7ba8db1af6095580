"""Models whose path depends on an argument, on state, on data or on a length: exact on every call, or refused."""

from __future__ import annotations

import functools
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms
from path_checks import Call, assert_close, check, features_of_squares, inputs, loop, modes, norms_of, two_ways
from small_nets import Net
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastgrad


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("given", ["abab", [0, 1, 0, 1], ["a", "functional", "b", "a", "functional"]])
def test_an_argument_chooses(given: Any) -> None:
    check(two_ways(), [((inputs(5, 3, seed=i),), {"mode": mode}) for i, mode in enumerate(given)])


@pytest.mark.parametrize("given", ["abab", ["a", "functional", "b", "a", "functional"]])
def test_an_attribute_chooses(given: Any) -> None:
    calls: list[Call] = [((inputs(5, 3, seed=i),), {}) for i in range(len(given))]
    check(two_ways(), calls, [{"mode": mode} for mode in given])


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.LayerNorm(3), nn.GELU()])
def test_an_attribute_chooses_the_parameter_that_a_layer_is_given(layer: nn.Module) -> None:
    model = Net(lambda net, x: net.head(x * net.layer(net.p if net.on else net.q)), layer=layer, head=nn.Linear(3, 2))
    model.p, model.q = nn.Parameter(inputs(1, 3)), nn.Parameter(inputs(1, 3, seed=1))
    check(model, [((inputs(5, 3),), {})] * 3, [{"on": on} for on in (True, False, True)])


def deeper(scaled: bool) -> Net:
    """Another layer where a value is large, and a scale that only those calls use."""

    def function(net: Any, x: Tensor) -> Tensor:
        h = torch.tanh(net.first(x))
        if x.abs().max() > 100:
            h = torch.tanh(net.more(h))
            if scaled:
                h = h * net.scale
        return net.head(h)

    parts = {"first": nn.Linear(3, 3), "more": nn.Linear(3, 3), "head": nn.Linear(3, 2)}
    return Net(function, **parts, scale=nn.Parameter(torch.rand(3)))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("place", [0, 5])
def test_the_data_choose(scaled: bool, place: int) -> None:
    x = inputs(6, 3)
    large = x.clone()
    large[place, 0] = 200.0
    model = deeper(scaled).double().eval()
    extractor = features_of_squares(model)
    for batch in (x, large, x, large):
        truth = loop(model, (batch,), {})
        assert_close(norms_of(model, batch), truth)
        assert_close(extractor(batch)[1], truth)


def unrolled(net: Any, x: Tensor) -> Tensor:
    """One layer for every step of a sequence ``(B, T, 3)``."""
    h = x.new_zeros(len(x), 3)
    for t in range(x.shape[1]):
        step = net.cell
        h = torch.tanh(step(h + x[:, t])) if isinstance(step, nn.Linear) else step(x[:, t], h)
    return net.head(h)


@pytest.mark.parametrize("cell", [nn.Linear(3, 3), nn.GRUCell(3, 3)])
@pytest.mark.parametrize("lengths", [(1, 4, 2), (1, 3), (3, 1, 5)])
def test_a_length_chooses(cell: nn.Module, lengths: tuple[int, ...]) -> None:
    check(Net(unrolled, cell=cell, head=nn.Linear(3, 2)), [((inputs(5, length, 3),), {}) for length in lengths])


SUMMED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "rule": lambda net, x: net.layer(x),
    "rows": lambda net, x: net.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
    "weight": lambda net, x: torch.tanh(x @ net.layer.weight),
    "twice": lambda net, x: net.layer(torch.tanh(net.layer(x))),
    "attention": lambda net, x: net.attention(x, x, x, need_weights=False)[0],
    "encoder": lambda net, x: net.encoder(x),
}


@pytest.mark.parametrize("lengths", [(3, 0, 2), (0, 3, 0)])
@pytest.mark.parametrize("way", SUMMED)
def test_sequences_without_a_position(way: str, lengths: tuple[int, ...]) -> None:
    parts: dict[str, nn.Module] = {
        "layer": nn.Linear(4, 4),
        "attention": nn.MultiheadAttention(4, 2, batch_first=True),
        "encoder": nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
    }
    model = Net(lambda net, x: net.head(SUMMED[way](net, x).sum(1)), head=nn.Linear(4, 2), **parts)
    check(model, [((inputs(5, length, 4),), {}) for length in lengths])


def neighbours(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    """Nodes to which their neighbours are added."""
    h = torch.tanh(net.layer(x))
    return net.head(h.index_add(0, edges[1], h[edges[0]]))


def test_nodes_meet_once_a_graph_has_edges() -> None:
    model, x = Net(neighbours, layer=nn.Linear(3, 3), head=nn.Linear(3, 2)).double(), inputs(4, 3)
    none, some = torch.zeros(2, 0, dtype=torch.long), torch.tensor([[0, 1], [1, 2]])
    extractor = features_of_squares(model)
    for call in (functools.partial(norms_of, model), lambda *args: extractor(*args)[1]):
        for _ in range(2):
            assert_close(call(x, none), loop(model, (x, none), {}))
            with pytest.raises(ValueError, match="must treat the samples of a batch independently"):
                call(x, some)


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda x, table: x + table.mean(0),
    "prototypes": lambda x, table: (x @ table.mT).softmax(-1) @ table,
    "positions": lambda x, table: x + table[0],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("known", [1, 6])
def test_a_table_of_as_many_rows_as_the_batch_is_shared(use: str, known: int) -> None:
    """Also where its first rows are alike, as those of what is not yet known."""
    model = Net(lambda net, x, table: net.head(torch.tanh(USES[use](x, table))), head=nn.Linear(6, 2))
    table = torch.cat([inputs(6 - known, 6) * 0, inputs(known, 6, seed=1)])
    check(model, [((inputs(6, 6), table), {})])


def test_a_refusal_leads_to_where_the_model_raised_it() -> None:
    def raising(net: Any, x: Tensor) -> Tensor:
        raise ValueError("labels are missing")

    for args in ((inputs(4, 3),), (inputs(4, 4), inputs(4, 4))):
        with pytest.raises(ValueError, match="labels are missing") as caught:
            norms_of(Net(lambda net, *_: raising(net, _[0]), layer=nn.Linear(3, 3)).double(), *args)
        assert caught.traceback[-1].name == "raising"


def exits(net: Any, x: Tensor) -> Tensor:
    """Layers of which a call takes the first few, with an optional auxiliary head on the way."""
    extra: Tensor | float = 0.0
    for i, layer in enumerate(net.layers[: net.depth]):
        x = torch.tanh(layer(x))
        if net.helped and i == 0:
            extra = net.auxiliary(x)
    return net.head(x) + extra


def test_early_exits_and_optional_heads() -> None:
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    model = Net(exits, layers=layers, auxiliary=nn.Linear(3, 2), head=nn.Linear(3, 2), depth=4, helped=False)
    states = [(2, False), (4, False), (1, True), (4, True), (2, False)]
    check(model, [((inputs(5, 3),), {})] * 5, [{"depth": depth, "helped": helped} for depth, helped in states])


def bare(net: Any, x: Tensor) -> Tensor:
    """A parameter that calls broadcast, multiply with, or leave alone."""
    if net.way == "mul":
        x = x * net.scale
    elif net.way == "sum":
        x = x * net.scale.sum()
    elif net.way == "matmul":
        x = x * (x @ net.scale).unsqueeze(1)
    return net.head(torch.tanh(x))


@pytest.mark.parametrize("ways", [("mul", "sum", "matmul", "none", "mul"), ("none", "mul", "none", "sum")])
def test_bare_parameters_under_a_branch(ways: tuple[str, ...]) -> None:
    model = Net(bare, scale=nn.Parameter(torch.rand(3)), head=nn.Linear(3, 2), way="mul")
    check(model, [((inputs(5, 3),), {})] * len(ways), [{"way": way} for way in ways])


def dropped(net: Any, x: Tensor) -> Tensor:
    """Drops layers in training mode, by Python's generator or PyTorch's."""
    for layer in net.layers:
        if not net.training or net.draw() > 0.5:
            x = torch.tanh(layer(x))
    return net.head(x)


@pytest.mark.parametrize("begin", [False, True])
def test_another_view_of_the_memory_of_a_parameter_is_computed_again_without_vmap(begin: bool) -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.tanh(x @ (net.factor.as_strided((3, 3), (1, 3)) if net.on else net.factor)))

    model = Net(function, factor=nn.Parameter(inputs(3, 3)), head=nn.Linear(3, 2))
    check(model, [((inputs(5, 3),), {})] * 3, [{"on": begin}, {"on": not begin}, {"on": begin}])


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(()))])
def test_dropped_layers(draw: Callable[[], float]) -> None:
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    model = Net(dropped, layers=layers, head=nn.Linear(3, 2), draw=draw).double().train()
    x = inputs(5, 3)
    for seed in range(12):
        random.seed(seed)
        torch.manual_seed(seed)
        truth = loop(model, (x,), {})
        after = random.random(), float(torch.rand(()))
        random.seed(seed)
        torch.manual_seed(seed)
        assert_close(norms_of(model, x), truth)
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


def test_a_function_of_autograd_under_a_branch() -> None:
    model = Net(
        lambda net, x: net.head(Squared.apply(x, net.weight) if net.on else x),
        weight=nn.Parameter(torch.rand(3)),
        head=nn.Linear(3, 2),
    )
    check(model, [((inputs(5, 3),), {})] * 4, [{"on": number in (1, 3)} for number in range(4)])


class Image(Tensor):
    """Leaves its class when it is indexed, as images of torchvision do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        kept = func is Tensor.detach or not isinstance(result, Image)
        return result if kept else result.as_subclass(Tensor)


def test_inputs_of_a_class_of_their_own() -> None:
    model = Net(
        lambda net, x: net.head(net.own(x).tanh() if isinstance(x, Image) else x),
        own=nn.Linear(3, 3), head=nn.Linear(3, 2),
    ).double()  # fmt: skip
    for x in (inputs(5, 3), inputs(5, 3).as_subclass(Image)):
        assert_close(norms_of(model, x), loop(model, (x,), {}))
        for chunk_size in (None, 2):
            assert_close(features_of_squares(model, chunk_size)(x)[1], loop(model, (x,), {}))


def test_checkpointing() -> None:
    model = two_ways(lambda net, x, mode: checkpoint(functools.partial(modes, net), x, mode, use_reentrant=False))
    model = model.double().eval()
    for mode in ("a", "b", "functional", "a"):
        x = inputs(4, 3)
        assert_close(norms_of(model, x, mode), loop(model, (x, mode), {}))


def test_clipping_and_ranking() -> None:
    model = two_ways().double().eval()
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
    model, x = two_ways().double().eval(), inputs(5, 3)
    extractor = fastgrad.GradientFeatures(model, compile=compiled)
    plain = fastgrad.GradientFeatures(model)
    for mode in ("a", "b", "functional", "a"):
        model.mode = mode
        found = extractor(x) if compiled else extractor.trace(x)(x)
        torch.testing.assert_close(found, plain(x))


def test_a_graph_cannot_follow_the_data() -> None:
    extractor = fastgrad.GradientFeatures(deeper(False).double().eval())
    with pytest.raises(ValueError, match="values of its inputs"):
        extractor.trace(inputs(4, 3))


def test_a_mode_of_the_users_sees_the_functions_of_layers() -> None:
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double().eval(), inputs(5, 3)
    expected = norms_of(model, x)
    with Watch():
        found = norms_of(model, x)
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


def test_a_parameter_out_of_reach_under_a_branch_is_refused() -> None:
    outer, x = nn.Linear(3, 3), inputs(5, 3)
    model = Net(
        lambda net, x: net.head(net.closure(x) if net.on else x),
        outer=outer,
        head=nn.Linear(3, 2),
        on=False,
        closure=lambda x, layer=outer: F.linear(x, layer.weight),
    )
    model.double().eval()
    extractor = fastgrad.GradientFeatures(model)
    extractor(x)
    model.on = True
    refused = pytest.raises(ValueError, match=r"'outer.weight'.*attribute of one of its modules")
    with refused:
        extractor(x)
    # Nor does it count that an earlier call has used it.
    with fastgrad.record(model), refused:
        outer(x)
        model(x)
