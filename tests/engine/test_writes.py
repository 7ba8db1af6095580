"""Models that write to buffers, inputs, parameters, lists or caches: what a call leaves of that is what one leaves."""

from __future__ import annotations

import collections
import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from path_checks import assert_close, features_of_squares, inputs, loop, norms_of, one_layer
from small_nets import Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgrad.blocks.subject import watch
from fastgrad.engine.objects import Objects


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
