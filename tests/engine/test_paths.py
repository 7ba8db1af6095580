"""Models whose path depends on an argument, on state, on data or on a length: exact on every call, or refused."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import itertools
import random
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms
from small_nets import Net, recorded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastgrad
from fastgrad.blocks.subject import watch
from fastgrad.engine.objects import Objects

Call = tuple[tuple[Any, ...], dict[str, Any]]


def loop(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``(B, P)``: squared norms of the gradients of each row of the output's sum of squares, along the batch's path."""
    return loss_norms((row.square().sum() for row in model(*args, **kwargs)), model)


def norms_of(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return recorded(model, lambda: model(*args, **kwargs).square().sum())


def features_of_squares(model: nn.Module, chunk_size: int | None = None) -> fastgrad.GradientFeatures:
    return fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z), chunk_size=chunk_size)


def assert_close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


def check(model: nn.Module, calls: Iterable[Call], states: Iterable[dict[str, Any]] = ()) -> None:
    """Every call, by recording, by features and by features of chunks, against the loop.

    Before each call its state's attributes are set on the model.
    """
    model = model.double().eval()
    extractors = [features_of_squares(model), features_of_squares(model, chunk_size=2)]
    for (args, kwargs), state in itertools.zip_longest(calls, states, fillvalue={}):
        vars(model).update(state)
        truth = loop(model, args, kwargs)
        assert_close(norms_of(model, *args, **kwargs), truth)
        for extractor in extractors:
            assert_close(extractor(*args, **kwargs)[1], truth)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def modes(net: Any, x: Tensor, mode: Any = None) -> Tensor:
    """Two layers, of which an argument, an attribute or the data chooses."""
    mode = net.mode if mode is None else mode
    if mode == "functional":
        return net.head(F.linear(x, net.a.weight).tanh())
    return net.head(net.a(x).tanh() if mode in ("a", 0) else net.b(x).tanh())


def two_ways(function: Callable[..., Tensor] = modes) -> Net:
    return Net(function, a=nn.Linear(3, 3), b=nn.Linear(3, 3), head=nn.Linear(3, 2), mode="a")


def one_layer(function: Callable[..., Tensor], **parts: Any) -> Net:
    return Net(function, layer=nn.Linear(3, 3), head=nn.Linear(3, 2), **parts)


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


def transposed(net: Any, x: Tensor, moved: bool) -> Tensor:
    """One layer before or after its batch was moved."""
    h = net.layer(x.transpose(0, 1)).transpose(0, 1) if moved else net.layer(x)
    return net.head(torch.tanh(h).mean(1))


def test_the_batch_in_another_place() -> None:
    calls: list[Call] = [((inputs(4, 6, 3), moved), {}) for moved in (False, True, False, True)]
    check(one_layer(transposed), [*calls, ((inputs(6, 6, 3), True), {}), ((inputs(6, 6, 3), False), {})])


def told(net: Any, x: Tensor) -> Tensor:
    """One layer before or after its batch was moved, which one equation says."""
    h = torch.einsum("btd->tbd" if net.moved else "btd->btd", x)
    return net.head(torch.einsum("tbd->bd" if net.moved else "btd->bd", torch.tanh(net.layer(h))))


def test_an_equation_moves_the_batch() -> None:
    calls: list[Call] = [((inputs(6, 6, 3),), {})] * 3
    check(one_layer(told), calls, [{"moved": number == 1} for number in range(3)])


def test_a_later_hook_where_gradients_alone_pass() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 2)).double()
    extractor = features_of_squares(model)
    extractor(inputs(5, 3))

    def triple(_: nn.Module, __: Any, output: Tensor) -> None:
        # Without gradients of parameters the forward pass does not come to it; what is computed again does.
        if output.requires_grad:
            output.register_hook(lambda g: 3 * g)

    layer.register_forward_hook(triple)
    assert_close(extractor(inputs(5, 3))[1], loop(model, (inputs(5, 3),), {}))


def hooked(net: Any, x: Tensor) -> Tensor:
    """A layer whose gradients a hook may divide by the largest in the batch."""
    h = net.layer(x)
    if net.on:
        h.register_hook(lambda g: g / g.abs().max())
    return net.head(torch.tanh(h))


def test_a_hook_under_a_branch_is_refused_where_samples_meet() -> None:
    model = one_layer(hooked, on=False).double().eval()
    extractor = fastgrad.GradientFeatures(model)
    check(model, [((inputs(5, 3),), {})])
    extractor(inputs(5, 3))
    model.on = True
    for call in (functools.partial(norms_of, model), extractor):
        with pytest.raises(ValueError, match=r"gradients of .* change with the other samples"):
            call(inputs(5, 3))


@pytest.mark.parametrize(
    "along",
    [
        lambda h, dim: F.normalize(h, dim=dim),
        lambda h, dim: h - h.median(dim, keepdim=True)[0],
        lambda h, dim: h / torch.linalg.vector_norm(h, dim=dim, keepdim=True),
        lambda h, dim: h * h.topk(1, dim)[0],
    ],
)
def test_another_dimension_is_refused_where_samples_meet(along: Callable[[Tensor, int], Tensor]) -> None:
    model = one_layer(lambda net, x: net.head(along(net.layer(x), net.dim)), dim=1).double().eval()
    extractor = fastgrad.GradientFeatures(model)
    check(model, [((inputs(5, 3),), {})])
    extractor(inputs(5, 3))
    model.dim = 0
    for call in (functools.partial(norms_of, model), extractor):
        with pytest.raises(ValueError, match=r"change.* with the other samples"):
            call(inputs(5, 3))


def in_order(net: Any, x: Tensor) -> Tensor:
    """Works through its samples in the order of their lengths."""
    order = x[..., 0].flatten(1).sum(1).argsort()
    h = net.body(x[order])
    h = h[0] if isinstance(h, tuple) else h
    return net.head(torch.tanh(h[order.argsort()]).mean(1))


@pytest.mark.parametrize("body", [nn.Linear(3, 3), nn.LSTM(3, 3, batch_first=True)])
def test_samples_in_another_order(body: nn.Module) -> None:
    model = Net(in_order, body=body, head=nn.Linear(3, 2))
    ordered = inputs(5, 2, 3)
    ordered = ordered[ordered[..., 0].sum(1).argsort()]
    check(model, [((ordered,), {}), ((ordered.flip(0),), {}), ((inputs(5, 2, 3),), {})])


def written(x: Tensor, there: Tensor | list[int]) -> Tensor:
    rows = torch.zeros_like(x)
    if isinstance(there, Tensor):
        rows[there] = x
        return rows
    for place, row in zip(there, x, strict=True):
        rows[place] = row
    return rows


def sorted_by(way: str, net: Any, x: Tensor) -> Tensor:
    """Works through its samples in the order of their first values."""
    order = x[:, 0].argsort(stable=True)
    there, index = order.argsort(), order.unsqueeze(1).expand_as(x)
    products = F.one_hot(order, len(x)).to(x)
    ways: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: torch.stack([x[i] for i in order.tolist()]),
        "slices": lambda: torch.cat([x[i : i + 1] for i in map(int, order)]),
        "items": lambda: x[sorted(range(len(x)), key=lambda i: x[i, 0].item())],
        "array": lambda: x[order.numpy()],
        "tensor": lambda: x.index_select(0, torch.tensor(order.tolist())),
        "padded": lambda: pad_sequence([x[i].unsqueeze(1) for i in order.tolist()], batch_first=True).squeeze(2),
        "one by one": lambda: written(x, there.tolist()),
        "take": lambda: torch.take(x, index * x.shape[1] + torch.arange(x.shape[1])),
        "embedding": lambda: F.embedding(order, x),
        "index_copy": lambda: torch.zeros_like(x).index_copy(0, there, x),
        "index_put": lambda: torch.zeros_like(x).index_put((there,), x),
        "setitem": lambda: written(x, there),
        "scatter": lambda: torch.zeros_like(x).scatter(0, index.argsort(0), x),
        "einsum": lambda: torch.einsum("ij,jd->id", products, x),
        "linear": lambda: F.linear(products, x.T),
        "bmm": lambda: torch.bmm(products.unsqueeze(0), x.unsqueeze(0))[0],
        "sum": lambda: (products.unsqueeze(2) * x).sum(1),
    }
    return net.head(torch.tanh(net.layer(ways[way]()))[there])


@pytest.mark.parametrize(
    "way", ["rows", "take", "embedding", "index_copy", "index_put", "scatter", "einsum", "linear", "bmm", "sum"]
)
def test_an_order_that_values_decide_is_seen_whatever_puts_samples_into_it(way: str) -> None:
    """In the first call they have it already, so that no gradient shows it."""
    x = inputs(5, 3)
    ordered = x[x[:, 0].argsort()]
    model = one_layer(functools.partial(sorted_by, way))
    check(model, [((ordered,), {}), ((ordered.flip(0),), {}), ((x[:3],), {})])


@pytest.mark.parametrize(
    "way",
    [
        "setitem", "index_copy", "index_put", "scatter", "take", "embedding", "linear", "rows", "slices", "items",
        "array", "tensor", "padded", "one by one",
    ],
)  # fmt: skip
def test_an_order_that_does_not_show_in_the_first_call_is_seen_by_what_makes_it(way: str) -> None:
    x = inputs(5, 3)
    alike = torch.cat([torch.ones_like(x[:, :1]), x[:, 1:]], 1)
    check(one_layer(functools.partial(sorted_by, way)), [((alike,), {}), ((x,), {})])


def in_steps(x: Tensor) -> Tensor:
    rows = torch.zeros_like(x.transpose(0, 1))
    for t in range(len(rows)):
        rows[t] = x[:, t]
    return rows.transpose(0, 1)


#: Of models that read a value, and put together or index what are no rows of samples.
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "steps": lambda x: torch.stack([x[:, t] for t in range(x.shape[1])]).transpose(0, 1),
    "written": in_steps,
    "appended": lambda x: torch.cat([x.transpose(0, 1), x.transpose(0, 1)[:1]]).transpose(0, 1),
    "axis": lambda x: torch.cat([x, x], axis=1),  # type: ignore[call-arg]
    "list": lambda x: x.transpose(0, 1)[[1, 0, 2]].transpose(0, 1),
    "take": lambda x: x.take(torch.arange(x.numel()).flip(0)).reshape(x.shape).flip(0),
}


@pytest.mark.parametrize("way", READ)
def test_a_value_that_is_read_leaves_rules_to_what_is_not_chosen_by_it(way: str) -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        assert x.max().item() < 100
        return net.head(torch.tanh(READ[way](net.layer(x)))).mean(1)

    model = Net(function, layer=nn.Linear(3, 3), head=nn.Linear(3, 2))
    check(model, [((inputs(5, 3, 3),), {})])
    extractor = features_of_squares(model)
    extractor(inputs(5, 3, 3))
    assert {route.route for route in extractor.report()} == {"linear"}


def test_a_factor_may_be_given_by_name() -> None:
    parts = {"layer": nn.Linear(3, 3), "factor": nn.Parameter(inputs(3, 2))}
    model = Net(lambda net, x: torch.matmul(net.layer(x), other=net.factor), **parts)
    check(model, [((inputs(5, 3),), {})])


def packed(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    sequences = pack_padded_sequence(x, lengths, batch_first=True)
    return net.head(net.body(sequences)[1][0])


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_sequences_that_must_come_longest_first(samples: int) -> None:
    model = Net(packed, body=nn.GRU(3, 3, batch_first=True), head=nn.Linear(3, 2))
    check(model, [((inputs(samples, 6, 3), torch.arange(6, 6 - samples, -1)), {})])


def test_samples_in_reverse() -> None:
    check(one_layer(lambda net, x: net.head(torch.tanh(net.layer(x.flip(0))).flip(0))), [((inputs(5, 3),), {})])


def gated(net: Any, x: Tensor) -> Tensor:
    """Two experts, of which every sample uses one, on samples in another order."""
    order = x[:, 1].argsort()
    x = net.there(x, order)
    gate = (x[:, :1] > 0).to(x.dtype)
    return net.back(gate * net.experts[0](x) + (1 - gate) * net.experts[1](x), order)


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (lambda x, _: x.flip(0), lambda x, _: x.flip(0)),
        (lambda x, _: torch.flipud(x), lambda x, _: torch.flipud(x)),
        (lambda x, _: x.roll(1, 0), lambda x, _: x.roll(-1, dims=0)),
        (lambda x, order: x.index_select(0, order), lambda x, order: x.index_select(0, order.argsort())),
        (lambda x, order: x[order], lambda x, order: x[order.argsort()]),
        (lambda x, _: torch.stack(x.unbind()[::-1]), lambda x, _: torch.stack(x.unbind()[::-1])),
        (lambda x, _: torch.cat([x[1:], x[:1]]), lambda x, _: torch.cat([x[-1:], x[:-1]])),
        (lambda x, _: x.T.flip(1).T, lambda x, _: x.T.flip(1).T),
    ],
    ids=["flip", "flipud", "roll", "index_select", "index", "stack", "cat", "transposed"],
)
def test_an_expert_that_the_first_call_does_not_use_serves_samples_in_another_order(there: Any, back: Any) -> None:
    model = Net(gated, experts=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), there=there, back=back)
    check(model, [((inputs(5, 3).abs(),), {}), ((inputs(5, 3, seed=1),), {})])


def beside(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What matters, and what is of all samples. No rule serves a layer that is used twice."""
    h = torch.tanh(net.layer(x))
    return net.layer(h), h - h.mean(0)


def test_what_a_model_returns_of_all_samples_beside_its_logits_is_no_matter() -> None:
    model, x = Net(beside, layer=nn.Linear(3, 3)).double().eval(), inputs(5, 3)
    truth = loss_norms((row.square().sum() for row in model(x)[0]), model)
    assert_close(features_of_squares(model)(x)[1], truth)


def test_a_part_that_gives_what_is_of_all_samples_beside_what_is_used_is_run_again_alone() -> None:
    model = Net(lambda net, x: net.head(net.part(x)[0]), part=Net(beside, layer=nn.Linear(3, 3)), head=nn.Linear(3, 2))
    check(model, [((inputs(5, 3),), {})])
    extractor = features_of_squares(model)
    extractor(inputs(5, 3))
    assert {route.module for route in extractor.report() if route.route == "fallback"} == {"part"}


def test_a_layer_on_positions_behind_another_leaves_the_rest_of_the_plan_as_it_is() -> None:
    chain = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model = one_layer(lambda net, x: net.head((net.layer(x) * net.scale + net.at(net.places)).mean(1)), at=chain)
    model.places, model.scale = inputs(1, 2, 3), nn.Parameter(inputs(1, 1, 3))
    check(model, [((inputs(5, 2, 3),), {})])
    extractor = features_of_squares(model)
    extractor(inputs(5, 2, 3))
    routes = {route.parameter: route.route for route in extractor.report()}
    assert {name for name, route in routes.items() if route == "fallback"} == {"at.1.weight", "at.1.bias"}
    assert routes["scale"] == "broadcast"


def counted(net: Any, x: Tensor) -> Tensor:
    """Scales its input by how often it was called, over the steps of a sequence."""

    def step(x: Tensor) -> Tensor:
        net.count += 1
        return torch.tanh(net.layer(x * (1 + net.count % 2)))

    return torch.stack([step(x[:, t]) for t in range(x.shape[1])], 1)


def test_what_is_computed_again_has_the_attributes_that_the_call_began_with() -> None:
    model, x = Net(counted, layer=nn.Linear(4, 4), count=0).double(), inputs(3, 3, 4)
    for _ in range(2):
        truth = loop(copy.deepcopy(model), (x,), {})
        assert_close(norms_of(model, x), truth)
    assert model.count == 6


def counting(net: Any, x: Tensor) -> Tensor:
    """Counts large batches in a buffer, within a checkpoint, whose backward pass runs it again."""

    def part(x: Tensor) -> Tensor:
        if len(x) > 3:
            net.count += 1
        return net.layer(x)

    return checkpoint(part, x, use_reentrant=False)


def test_planning_changes_no_buffer() -> None:
    # Planning runs more samples than the call has.
    model, x = Net(counting, layer=nn.Linear(3, 3), count=nn.Buffer(torch.zeros(()))).double().eval(), inputs(2, 3)
    truth = loop(model, (x,), {})
    assert_close(norms_of(model, x), truth)
    assert float(model.count) == 0


def shifting(net: Any, x: Tensor, scale: Tensor) -> Tensor:
    """Writes to its input."""
    return net.layer(x.sub_(0.5)).tanh() * scale


def test_a_model_that_writes_to_its_input_does_so_once_a_call() -> None:
    # With as many rows as columns, which inputs carry the batch is tried on the whole of it.
    model, x, scale = Net(shifting, layer=nn.Linear(3, 3)).double(), inputs(3, 3), inputs(3, 3, seed=1)
    truth, extractor = loop(model, (x.clone(), scale), {}), features_of_squares(model)
    for call in (functools.partial(norms_of, model), lambda *args: extractor(*args)[1]):
        for _ in range(2):
            given = x.clone()
            assert_close(call(given, scale), truth)
            assert_close(given, x - 0.5)


WRITES: dict[str, Callable[[Any], Any]] = {
    "moving average": lambda net: net.slow.weight.mul_(0.9).add_(net.layer.weight, alpha=0.1),
    "of all": lambda net: torch._foreach_lerp_([net.slow.weight.data], [net.layer.weight.data], 0.1),
    "item": lambda net: net.slow.weight[:1].__setitem__(0, 1.0),
    "scale": lambda net: net.layer.weight.div_(2),
    "out": lambda net: torch.lerp(net.slow.weight, net.layer.weight, 0.1, out=net.slow.weight),
}


def writing(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        WRITES[net.way](net)
    return net.layer(x) - net.slow(x).detach()


@pytest.mark.parametrize("way", WRITES)
def test_a_model_that_writes_to_its_parameters_is_refused_before_it_does(way: str) -> None:
    model, x = Net(writing, way=way, layer=nn.Linear(3, 3), slow=nn.Linear(3, 3)).double(), inputs(4, 3)
    before = copy.deepcopy(model.state_dict())
    for call in (functools.partial(norms_of, model), features_of_squares(model), lambda x: watch(model, (x,), {})):
        with pytest.raises(ValueError, match=r"must not write to its parameters .* wrote to '(slow|layer)"):
            call(x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def limited(net: Any, x: Tensor) -> Tensor:
    """Masks a weight, as for pixels that see those before them alone, and keeps a scale within limits."""
    net.layer.weight.data *= net.mask
    with torch.no_grad():
        net.scale.clamp_(0.1, 0.5)
    return torch.tanh(net.layer(x)) / net.scale


def masked(net: Any, x: Tensor) -> Tensor:
    """The same by assignments to the model."""
    with torch.no_grad():
        net.layer.weight *= net.mask
        net.scale = net.scale.clamp_(0.1, 0.5)
    return torch.tanh(net.layer(x)) / net.scale


@pytest.mark.parametrize("function", [limited, masked])
def test_a_model_may_write_to_its_parameters_what_stays_when_it_is_written_again(function: Any) -> None:
    parts = {"layer": nn.Linear(3, 3), "scale": nn.Parameter(torch.tensor(0.7)), "mask": torch.ones(3, 3).tril()}
    model, x = Net(function, **parts).double(), inputs(4, 3)
    found = norms_of(model, x)
    for again in (found, norms_of(model, x), features_of_squares(model)(x)[1]):
        assert_close(again, loop(model, (x,), {}))
    assert model.scale == 0.5
    assert watch(model, (x,), {})


def replacing(net: Any, x: Tensor) -> Tensor:
    """Gives a layer the moving average of another one's numbers, on whichever path."""
    net.slow.weight.data = 0.9 * net.slow.weight.data + 0.1 * net.layer.weight.data
    h = net.layer(x) - net.slow(x)
    return net.head(h).tanh() if net.deep else h


def test_a_moving_average_moves_once_on_a_path_that_was_not_seen_before() -> None:
    model, x = one_layer(replacing, slow=nn.Linear(3, 3), deep=False).double(), inputs(4, 3)
    for model.deep in (False, True, True):
        plain = copy.deepcopy(model)
        truth = loop(plain, (x,), {})
        assert_close(norms_of(model, x), truth)
        assert torch.equal(model.slow.weight, plain.slow.weight)


def logging(net: Any, x: Tensor) -> Tensor:
    """Keeps a list of calls, which every fourth entry or so sends another way."""
    if net.always or net.deep:
        net.calls.append(len(x))
        net.count.value += 1
    return net.head(net.layer(x)).tanh() if net.deep or len(net.calls) % 3 == 2 else net.layer(x)


def test_a_list_gets_one_entry_from_a_call_on_a_path_that_was_not_seen_before() -> None:
    log: dict[str, Any] = {"calls": [], "count": types.SimpleNamespace(value=0)}
    model, x = one_layer(logging, always=True, deep=False, **log).double(), inputs(4, 3)
    for entries in range(1, 6):
        truth = loop(copy.deepcopy(model), (x,), {})
        assert_close(norms_of(model, x), truth)
        assert log["calls"] == [4] * entries
        assert log["count"].value == entries


def test_a_set_is_what_it_was_whatever_its_order() -> None:
    kinds = {8 * i for i in range(6)}
    kinds -= {0, 16, 32}
    objects = Objects(one_layer(lambda net, x: net.layer(x), kinds=kinds, words=["a", "b"], tables={"a": [1]}))
    assert list(kinds) != list(kinds.copy())
    assert not objects.changed()
    kinds.add(1)
    assert [part for part, _ in objects.changed()] == [kinds]
    objects.restore()
    assert kinds == {8, 24, 40}


def caching(net: Any, x: Tensor) -> Tensor:
    """Makes a table for each new length, and keeps it."""
    length = x.shape[1]
    if length not in net.tables:
        net.tables[length] = torch.linspace(0, 1, length, dtype=x.dtype).cos()
    return net.layer((x * net.tables[length]).sum(1, keepdim=True)).tanh()


@pytest.mark.parametrize("kind", [dict, lambda: collections.defaultdict(int)])
def test_a_cache_that_a_call_fills(kind: Callable[[], dict[int, Tensor]]) -> None:
    model = Net(caching, layer=nn.Linear(1, 3), tables=kind()).double()
    for length in (4, 4, 6, 6, 4, 5):
        x = inputs(4, length)
        truth = loop(Net(caching, layer=model.layer, tables={}), (x,), {})
        assert_close(norms_of(model, x), truth)
        assert length in model.tables


def test_a_list_that_one_path_alone_writes_to_is_refused_once() -> None:
    log: dict[str, Any] = {"calls": [], "count": types.SimpleNamespace(value=0)}
    model, x = one_layer(logging, always=False, deep=False, **log).double(), inputs(4, 3)
    norms_of(model, x)
    model.deep = True
    with pytest.raises(ValueError, match="must not write to lists, dicts or counters in a call whose path was not"):
        norms_of(model, x)
    assert log["calls"] == [4]
    log["calls"].clear()
    truth = loop(copy.deepcopy(model), (x,), {})
    assert_close(norms_of(model, x), truth)
    assert log["calls"] == [4]


def making(net: Any, x: Tensor) -> Tensor:
    """Makes its last layer in its first call, or a parameter in each."""
    if net.way == "layer" and net.last is None:
        net.last = nn.Linear(3, 2, dtype=x.dtype)
    if net.way == "parameter":
        net.layer.weight = nn.Parameter(net.layer.weight.detach() / 2)
    return net.last(net.layer(x))


@pytest.mark.parametrize("way", ["layer", "parameter"])
def test_a_model_that_makes_parameters_is_refused_and_left_as_it_was(way: str) -> None:
    last = None if way == "layer" else nn.Linear(3, 2)
    model, x = Net(making, way=way, layer=nn.Linear(3, 3), last=last).double(), inputs(4, 3)
    weight = model.layer.weight
    for call in (functools.partial(norms_of, model), features_of_squares(model)):
        with pytest.raises(ValueError, match=r"must not make parameters in forward.* it made '(last|layer).weight'"):
            call(x)
    assert model.last is last
    assert model.layer.weight is weight
    if way == "layer":
        model(x)
        assert_close(norms_of(model, x), loop(model, (x,), {}))


def test_what_a_model_computes_in_place_of_a_parameter_is_none_that_it_makes() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        net.layer._parameters["weight"] = net.own * net.mask
        return net.layer(x)

    layer = nn.Linear(3, 3)
    layer.weight = None  # type: ignore[assignment]
    parts = {"own": nn.Parameter(torch.randn(3, 3)), "mask": torch.ones(3, 3).tril(), "layer": layer}
    model, x = Net(function, **parts).double(), inputs(4, 3)
    found = norms_of(model, x), features_of_squares(model)(x)[1]
    # A call of the model itself leaves it one more.
    truth = loop(model, (x,), {})[:, [0, 2]]
    for each in found:
        assert_close(each, truth)


class Frozen(Net):
    """Names the parameters of its last layer alone, as for an optimizer."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs) if name.startswith("last"))


class Renamed(Net):
    """Names its last layer's parameters as that does, as wrappers do."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.last.named_parameters(*args, **kwargs)


@pytest.mark.parametrize("kind", [Frozen, Renamed])
def test_a_model_that_names_some_of_its_parameters(kind: type[Net]) -> None:
    model, x = kind(lambda net, x: net.last(net.first(x)), first=nn.Linear(3, 3), last=nn.Linear(3, 2)), inputs(4, 3)
    truth = loop(model.double(), (x,), {})
    assert truth.shape == (4, 2)
    assert_close(norms_of(model, x), truth)
    assert_close(features_of_squares(model)(x)[1], truth)


def test_a_model_may_write_to_what_it_made_itself() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        sparse = torch.eye(3, dtype=x.dtype).to_sparse().mul_(2)
        slopes = torch.func.grad(lambda rows: (rows * 1).add_(1).pow_(3).sum())(x)
        return net.layer(torch.sparse.mm(sparse, x.mT).mT) * slopes

    model, x = Net(function, layer=nn.Linear(3, 3)).double(), inputs(4, 3)
    truth = loop(model, (x,), {})
    assert_close(norms_of(model, x), truth)
    assert_close(features_of_squares(model)(x)[1], truth)


def test_a_table_whose_rows_have_a_largest_norm_is_written_to() -> None:
    parts = {"table": nn.Embedding(5, 3, max_norm=0.5), "layer": nn.Linear(3, 3)}
    model, x = Net(lambda net, x: net.layer(net.table(x) * net.table(x)), **parts).double(), torch.arange(4)
    truth = loop(model, (x,), {})
    assert_close(norms_of(model, x), truth)
    assert_close(features_of_squares(model)(x)[1], truth)


class Compared(Tensor):
    """A class that compares, and so has no hash."""

    def __eq__(self, other: object) -> Any:
        return super().__eq__(other)


@pytest.mark.parametrize("hold", [lambda table: table, lambda table: types.SimpleNamespace(table=table)])
def test_a_trial_copies_what_all_samples_share_once(hold: Callable[[Tensor], Any]) -> None:
    seen: list[Tensor] = []

    def looking_up(net: Any, x: Tensor, held: Any) -> Tensor:
        seen.append(getattr(held, "table", held))
        return (net.layer(x) @ seen[-1].T).as_subclass(Tensor)

    held = hold(inputs(7, 3).as_subclass(Compared))
    model, x = Net(looking_up, layer=nn.Linear(3, 3)).double(), inputs(5, 3)
    assert_close(norms_of(model, x, held), loop(model, (x, held), {}))
    assert all(type(each) is Compared for each in seen)
    seen.clear()
    features_of_squares(model)(x, held)
    assert len({each.untyped_storage().data_ptr() for each in seen}) == 2


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
