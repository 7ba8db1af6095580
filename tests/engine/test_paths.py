"""Models whose path depends on an argument, on state, on values or on a length: each sample takes its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import (
    Net,
    alone,
    assert_exact,
    check,
    check_several,
    features_of_squares,
    inputs,
    parts,
    recorded,
    routes,
)
from torch import Tensor, nn

import fastgrad

X = inputs(5, 3)


def modes(net: Any, x: Tensor, mode: Any = None) -> Tensor:
    """Two layers, of which an argument or an attribute chooses."""
    mode = net.mode if mode is None else mode
    if mode == "functional":
        return net.head(F.linear(x, net.layer.weight).tanh())
    return net.head(net.layer(x).tanh() if mode in ("a", 0) else net.other(x).tanh())


def exits(net: Any, x: Tensor) -> Tensor:
    """Layers of which a call takes the first few, with an optional head on the way."""
    extra: Tensor | float = 0.0
    for i, layer in enumerate((net.layer, net.other, net.layer)[: net.depth]):
        x = torch.tanh(layer(x))
        if net.helped and i == 0:
            extra = x @ net.matrix[:, :2]
    return net.head(x) + extra


def bare(net: Any, x: Tensor) -> Tensor:
    """A parameter that calls broadcast, multiply with, or leave alone."""
    ways = {"mul": lambda: net.scale, "sum": net.scale.sum, "matmul": lambda: (x @ net.scale).unsqueeze(1)}
    return net.head(torch.tanh(x * ways[net.way]() if net.way in ways else x))


MODES: tuple[Any, ...] = ("a", "functional", "b", "a", 1, 0)
#: Functions, and the attributes before each of their calls.
CHOSEN: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "attribute": (modes, [{"mode": mode} for mode in MODES]),
    "early exits": (exits, [{"depth": n, "helped": yes} for n, yes in [(2, False), (3, False), (1, True), (3, True)]]),
    "bare": (bare, [{"way": way} for way in ("none", "mul", "sum", "matmul", "none", "mul")]),
    "another view": (lambda net, x: net.head(x @ (net.matrix.as_strided((3, 3), (1, 3)) if net.on else net.matrix)),
        [{"on": on} for on in (False, True, False)]),
    "a parameter of two": (lambda net, x: net.head(x * net.layer(net.scale[None] if net.on else net.shift)),
        [{"on": on} for on in (True, False, True)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_an_attribute_chooses(name: str) -> None:
    function, states = CHOSEN[name]
    model = parts(function, shift=nn.Parameter(torch.rand(1, 3)))
    check(model, *[(inputs(5, 3, seed=i),) for i in range(len(states))], states=states)
    if name == "attribute":  # which an argument may override
        check(model, *[(inputs(5, 3, seed=i), mode) for i, mode in enumerate(MODES)])


def large(net: Any, x: Tensor, yes: Any) -> Tensor:
    """Another layer, and a scale, where a value is large."""
    h = torch.tanh(net.layer(x))
    return net.head(torch.tanh(net.other(h)) * net.scale if yes else h)


def counted(net: Any, x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = torch.tanh(net.layer(x))
    return net.head(x)


def halted(net: Any, x: Tensor) -> Tensor:
    """Steps until little is left."""
    n = 0
    while n < 3 and x.detach().abs().mean() > 0.3:
        x, n = 0.5 * net.layer(x), n + 1
    return net.head(x)


def nested(net: Any, x: Tensor) -> Tensor:
    """A branch in a branch: up to four groups of samples."""
    if x[0, 0] > 0:
        x = net.layer(x) if (x[0, 1] > 0).item() else net.other(x)
    elif x.sum().item() > 0:
        x = x * net.scale
    return net.head(x.tanh())


#: How a value is read into Python, and what becomes of it.
READ: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bool": lambda net, x: large(net, x, x.abs().max() > 100),
    "item": lambda net, x: large(net, x, x.abs().max().item() > 100),
    "int": lambda net, x: counted(net, x, min(int(x.abs().max()), 4)),
    "int, fewer steps": lambda net, x: counted(net, x, 4 - min(int(x.abs().max()), 3)),
    "tolist": lambda net, x: large(net, x, max(map(abs, x.tolist()[0])) > 100),
    "index": lambda net, x: net.head(x @ [net.matrix, net.layer.weight][(x.sum() > 0).long()]),
    "equal": lambda net, x: large(net, x, torch.equal(x, x.clamp(-100, 100))),
    "contains": lambda net, x: large(net, x, 1 in (x.abs() > 100)),
    "all close": lambda net, x: large(net, x, torch.allclose(x, x.clamp(-100, 100))),
    "numpy": lambda net, x: large(net, x, abs(x.detach().numpy()).max() > 100),
    "while": halted,
    "nested": nested,
    "slice": lambda net, x: net.head(torch.tanh(x[:, : 1 + int(x[0, 0] > 0)].sum(1, keepdim=True) * net.scale)),
    "mask": lambda net, x: net.head(torch.stack([(row[row > 0] ** 2).sum() * net.scale for row in x])),
    "nonzero": lambda net, x: net.head(x.index_select(1, x[0].nonzero()[:, 0]) @ net.matrix),
    "switched off": lambda net, x: net.head(net.layer(x)) if x[0, 0] > 0 else x[:, :2] * 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_value_chooses(name: str) -> None:
    """In the first call all samples are alike; later one sample, the first or the last, has large values."""
    first, last = (torch.cat([200 * X[:1], X[1:]]), torch.cat([X[:-1], 200 * X[-1:]]))
    check(parts(READ[name]), (0.1 * X.abs(),), (X,), (first,), (last,), (X[:1],), apart=True)


def unrolled(net: Any, x: Tensor) -> Tensor:
    """One layer, or a cell, for every step of a sequence ``(B, T, 3)``."""
    h = x.new_zeros(len(x), 3)
    for t in range(x.shape[1]):
        h = torch.tanh(net.layer(h + x[:, t])) if net.cell is None else net.cell(x[:, t], h)
    return h.unsqueeze(1)


#: Of sequences ``(B, T, 3)``: what is summed over positions, and the parts that it needs.
LENGTHS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "rule": (lambda net, x: net.layer(x), {}),
    "rows": (lambda net, x: net.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]), {}),
    "twice": (lambda net, x: net.layer(torch.tanh(net.layer(x))), {}),
    "attention": (lambda net, x: net.attention(x, x, x, need_weights=False)[0],
        {"attention": nn.MultiheadAttention(3, 1, batch_first=True)}),
    "unrolled": (unrolled, {"cell": None}),
    "GRU cell": (unrolled, {"cell": nn.GRUCell(3, 3)}),
    "RNN cell": (unrolled, {"cell": nn.RNNCell(3, 3, nonlinearity="relu")}),
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(1, 4, 2, 0), (0, 3, 0)])
@pytest.mark.parametrize("way", LENGTHS)
def test_a_length_chooses(way: str, lengths: tuple[int, ...]) -> None:
    function, layers = LENGTHS[way]
    model = parts(lambda net, x: net.head(function(net, x).sum(1)), **layers)
    check(model, *[(inputs(5, length, 3),) for length in lengths])


def padded(net: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """As encoders of text look whether anything is padded."""
    if mask is not None and not bool(mask.all()):
        x = torch.where(mask.unsqueeze(2), x, net.scale)
    return net.head(net.layer(x).tanh().mean(1))


def test_padded_samples_are_a_group() -> None:
    x, mask = inputs(5, 4, 3), torch.arange(4) < torch.tensor([4, 2, 4, 1, 4])[:, None]
    full = torch.ones_like(mask)
    model = parts(padded)
    check(model, (x, mask), (x, full), (x,), (x, mask))
    # Samples that take one path go together, so that no formula is lost.
    found = routes(model, x, mask)
    assert found["layer.weight"] == found["head.weight"] == "rule"
    assert found["scale"] == "copies"
    extractor = features_of_squares(model)
    for rows in (torch.tensor([3, 1, 0]), torch.tensor([2])):
        _, features = extractor(x[rows], mask[rows])
        assert_exact(features, alone(model, (x, mask))[rows])


def test_groups_take_part_in_one_backward_pass() -> None:
    model = parts(nested)
    assert len({tuple((row > 0).tolist()) for row in X[:, :2]}) > 2
    for x in (0.1 * X.abs(), X):
        check_several(model, model, x, torch.randn(2, 5, 2, dtype=torch.float64))


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda x, table: x + table.mean(0),
    "prototypes": lambda x, table: (x @ table.mT).softmax(-1) @ table,
    "positions": lambda x, table: x + table[0],
    "mask": lambda x, table: (table.tril() @ x.unsqueeze(2)).squeeze(2),
}


@pytest.mark.parametrize("use", USES)
def test_table_as_long_as_the_batch(use: str) -> None:
    model = Net(lambda net, x, table: net.head(torch.tanh(USES[use](x, table))), head=nn.Linear(6, 2)).double()
    x = inputs(6, 6)
    for table in (inputs(6, 6, seed=1), torch.cat([torch.zeros(5, 6), inputs(1, 6)])):
        bound = Net(lambda net, x, table=table: net.inner(x, table), inner=model)
        truth = alone(bound, (x,))
        with fastgrad.record(model, batch_dims={1: None}):
            found = fastgrad.grad_sqnorm(model(x, table).square().sum(1), model)
        assert_exact(torch.stack(found, 1), truth)
        with pytest.raises(ValueError, match="inputs must not be square in the batch; 1 was"):
            features_of_squares(model)(x, table)


def dropped(net: Any, x: Tensor) -> Tensor:
    """Drops layers in training mode."""
    for layer in (net.layer, net.other, net.layer):
        if not net.training or net.draw() > 0.5:
            x = torch.tanh(layer(x))
    return net.head(x)


def test_dropped_layers() -> None:
    """A user's own draws of PyTorch's generator go on as if nothing had been recorded."""
    model = parts(dropped, draw=lambda: float(torch.rand(()))).train()

    def seeded(seed: int) -> None:
        torch.manual_seed(seed)

    for seed in range(6):
        truth = torch.cat([(seeded(seed), alone(model, (row[None],)))[1] for row in X])
        after = float(torch.rand(()))
        seeded(seed)
        assert_exact(recorded(model, lambda: model(X).square().sum()), truth)
        assert float(torch.rand(())) == after


def test_a_refusal_leads_to_where_the_model_raised_it() -> None:
    def raising(net: Any, *_: Tensor) -> Tensor:
        raise ValueError("labels are missing")

    for args in ((inputs(4, 3),), (inputs(4, 3), inputs(4, 2))):
        model = parts(raising)
        with pytest.raises(ValueError, match="labels are missing") as caught:
            recorded(model, lambda args=args, model=model: model(*args))
        assert caught.traceback[-1].name == "raising"
