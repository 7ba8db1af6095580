"""Models that move the batch, put samples into another order, or let them meet: exact on every call, or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms
from path_checks import Call, assert_close, check, features_of_squares, inputs, loop, norms_of, one_layer
from small_nets import Net
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import fastgrad


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
