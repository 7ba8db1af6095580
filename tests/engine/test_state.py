"""Models that write to buffers, attributes, lists or objects: what a call leaves is what an ordinary one leaves."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms
from small_nets import (
    Net,
    alone,
    assert_exact,
    assert_norms,
    assert_same,
    features_of_squares,
    inputs,
    left,
    parts,
    recorded,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastgrad

X = inputs(4, 3)


def counted(net: Any, x: Tensor) -> Tensor:
    """Scales its input by how often it was called, over three steps."""
    for _ in range(3):
        net.count += 1
        x = torch.tanh(net.layer(x * (1 + net.count % 2)))
    return net.head(x)


def buffered(net: Any, x: Tensor) -> Tensor:
    """Counts calls in one buffer in place, and in another by assignment."""
    net.calls += 1
    net.seen = net.seen + 1
    return net.head(net.layer(x) * net.calls.cos())


def checkpointed(net: Any, x: Tensor) -> Tensor:
    def part(x: Tensor) -> Tensor:
        net.calls.add_(1)
        return net.layer(x)

    return net.head(checkpoint(part, x, use_reentrant=False))


def averaged(net: Any, x: Tensor) -> Tensor:
    """Follows a layer by another one that learns nothing."""
    net.slow.lerp_(net.layer.weight.detach(), 0.1)
    return net.head(net.layer(x) - x @ net.slow)


def shared(net: Any, x: Tensor) -> Tensor:
    """Leaves for later parts what earlier ones give."""
    net.skips.append(net.layer(x).tanh())
    net.context["scale"] = net.skips[0].square().mean(1, keepdim=True)
    return net.head((x + net.skips.pop()) * net.context["scale"])


def caching(net: Any, x: Tensor) -> Tensor:
    """Makes a table for each new length, and keeps it."""
    if x.shape[1] not in net.tables:
        net.tables[x.shape[1]] = torch.linspace(0, 1, x.shape[1], dtype=x.dtype).cos()
    return net.head((x * net.tables[x.shape[1]]).tanh() * net.scale)


def kept(net: Any, x: Tensor) -> Tensor:
    """Keeps what it computes from parameters, and uses it in later calls."""
    if "twice" not in net.tables:
        net.tables["twice"] = net.scale * 2
    return net.head(x * net.tables["twice"])


def collected(net: Any, x: Tensor) -> Tensor:
    """Adds hooks in its first call, which collect what layers give, as transformers do for hidden states."""
    if not net.hooked:
        for part in (net.layer, net.other):
            part.register_forward_hook(lambda _, __, output: net.skips.append(output))
        net.hooked = True
    net.skips.clear()
    net.other(net.layer(x).tanh())
    return net.head(torch.stack(list(net.skips), 1).prod(1))


def noted(net: Any, x: Tensor) -> Tensor:
    """A hook of a layer writes an attribute that is read later."""
    net.layer(x)
    return net.head(net.noted.tanh())


def stepped(net: Any, x: Tensor) -> Tensor:
    """Goes another way from its second call on."""
    first, net.first = net.first, False
    return net.head(net.layer(x) if first else net.other(x))


def clamped(net: Any, x: Tensor) -> Tensor:
    """Masks a weight and keeps a scale within limits: what stays if it is done again."""
    with torch.no_grad():
        net.layer.weight *= torch.ones(3, 3).tril()
        net.scale.clamp_(0.6, 1.2)
    return net.head(net.layer(x).tanh() / net.scale)


WRITES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attribute": counted,
    "buffers": buffered,
    "moving average": averaged,
    "list and dictionary": shared,
    "cache by shape": caching,
    "hook that writes": noted,
    "hooks that a call adds": collected,
    "second path": stepped,
}


def keeping(function: Callable[[Any, Tensor], Tensor]) -> Net:
    made: dict[str, Any] = {"count": 0, "skips": [], "context": {}, "tables": {}, "hooked": False, "first": True}
    buffers = {"calls": torch.zeros(()), "seen": torch.zeros(()), "slow": torch.zeros(3, 3)}
    return parts(function, noted=None, **made, **{name: nn.Buffer(value) for name, value in buffers.items()})


@pytest.mark.parametrize("way", WRITES)
def test_what_a_call_writes(way: str) -> None:
    """Each call is held against an ordinary one of a twin, which goes on from what the one before it left."""
    model, plain = twins = keeping(WRITES[way]), keeping(WRITES[way])
    for net in twins if way == "hook that writes" else ():
        net.layer.register_forward_hook(lambda _, __, output, net=net: setattr(net, "noted", output))
    for x in (X, inputs(4, 3, seed=1), X[:1]):
        before = left(model)
        features = features_of_squares(model)(x)[1]
        assert_same(left(model), before)
        assert_exact(features, truth := loss_norms((row.square().sum() for row in plain(x)), plain))
        assert_exact(recorded(model, lambda x=x: model(x).square().sum()), truth)
        assert_same(left(model), left(plain))


def test_features_leave_what_a_checkpoint_writes_again() -> None:
    model = keeping(checkpointed)
    assert_exact(features_of_squares(model)(X)[1], alone(model, (X,)))
    assert model.calls == 0


def test_features_leave_no_trace_of_a_call_that_fails() -> None:
    def failing(net: Any, x: Tensor) -> Tensor:
        net.skips.append(1)
        if net.hooked:
            raise LookupError("later")
        return net.head(net.layer(x))

    model = keeping(failing)
    (extractor := features_of_squares(model))(X)
    model.hooked = True
    with pytest.raises(LookupError, match="later"):
        extractor(X)
    assert not model.skips


def test_parameters_that_a_call_writes_to() -> None:
    model, plain = keeping(clamped), keeping(clamped)
    for _ in range(2):
        plain(X)
        found = recorded(model, lambda: model(X).square().sum())
        assert_same(left(model), left(plain))
        assert_exact(found, loss_norms((plain(row).square().sum() for row in X.split(1)), plain))
    table = nn.Embedding(5, 3, max_norm=0.5)
    model, x = parts(lambda net, x: net.head(net.table(x) * net.table(x)), table=table), torch.arange(4)
    for _ in range(2):
        table.weight.data *= 3
        found = recorded(model, lambda: model(x).square().sum())
        assert (table.weight[:4].norm(dim=1) <= 0.5 + 1e-6).all()
        assert_exact(found, loss_norms((row.square().sum() for row in model(x)), model))


def moving(net: Any, x: Tensor) -> Tensor:
    """Moves a parameter by each call, as a teacher follows its student."""
    with torch.no_grad():
        net.other.weight.lerp_(net.layer.weight, 0.5)
    return net.head(net.layer(x) - net.other(x))


def by_nonzero(net: Any, x: Tensor) -> Tensor:
    """Has samples run one by one."""
    at = (x > 0).nonzero(as_tuple=True)
    return torch.zeros_like(x).index_put(at, x[at])


def making(net: Any, x: Tensor) -> Tensor:
    """Makes its last layer in its first call."""
    if net.noted is None:
        net.noted = nn.Linear(3, 2, dtype=x.dtype)
    return net.noted(net.layer(x))


#: Functions that move or make parameters, and what the refusal says.
PARAMETERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "moving, alone": (
        lambda net, x: by_nonzero(net, moving(net, x)),
        "model must not write to its parameters in forward where its samples run one by one; .* 'other.weight'",
    ),
    "making": (making, "model must not create layers or parameters in forward"),
}


@pytest.mark.parametrize("way", PARAMETERS)
def test_parameters_that_a_call_moves_or_makes_are_refused(way: str) -> None:
    function, message = PARAMETERS[way]
    model = keeping(function)
    before = left(model)
    with pytest.raises(ValueError, match=message):
        recorded(model, lambda: model(X).square().sum())
    assert_same(left(model), before)
    if way == "making":  # which a first call outside may do
        model(X)
        assert_exact(recorded(model, lambda: model(X).square().sum()), alone(model, (X,)))


def test_a_parameter_that_follows_another_moves_once_a_call() -> None:
    model, plain = keeping(moving), keeping(moving)
    for _ in range(2):
        plain(X)
        found = recorded(model, lambda: model(X).square().sum())
        assert_same(left(model), left(plain))
        still = parts(lambda net, x: net.head(net.layer(x) - net.other(x)))
        still.load_state_dict(plain.state_dict(), strict=False)
        assert_exact(found, alone(still, (X,)))


#: By what they count in: how it begins, and what a call does to it.
COUNTS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "list": (list, lambda it: it.append(1)),
    "dictionary": (dict, lambda it: it.update(a=it.get("a", 0) + 1)),
    "set": (set, lambda it: it.add(len(it))),
    "deque": (lambda: collections.deque(maxlen=9), lambda it: it.append(1)),
    "counter": (collections.Counter, lambda it: it.update("a")),
    "tensor": (lambda: torch.zeros(()), lambda it: it.add_(1)),
}


@pytest.mark.parametrize("way", ["together", "groups", "alone"])
@pytest.mark.parametrize("kind", COUNTS)
def test_what_a_call_counts_is_counted_once(kind: str, way: str) -> None:
    begin, note = COUNTS[kind]

    def noting(net: Any, x: Tensor) -> Tensor:
        note(net.held)
        net.size = len(x)
        h = by_nonzero(net, net.layer(x)) if way == "alone" else net.layer(x)
        return net.head(h * 1.0 if way == "groups" and x[0, 0] > 0 else h)

    held, once = begin(), begin()
    model = parts(noting, held=held, size=0)
    fastgrad.GradientFeatures(model)(X)
    assert held == once
    assert model.size == 0
    for _ in range(2):
        recorded(model, lambda: model(X).sum())
        note(once)
        assert held == once
    assert model.held is held
    assert model.size == 1  # as each sample sees it


@pytest.mark.parametrize("detach", [False, True])
def test_a_tensor_of_parameters_that_an_earlier_call_kept(detach: bool) -> None:
    """Its gradient reaches the parameters through that call, sample by sample; detached, it is a constant."""
    model, fresh = keeping(kept), keeping(kept)
    truth = alone(fresh, (X,))
    assert_exact(features_of_squares(model)(X)[1], truth)
    assert not model.tables
    assert_exact(recorded(fresh, lambda: fresh(X).square().sum()), truth)
    model(X)
    if detach:
        model.tables["twice"] = model.tables["twice"].detach()
        truth = truth * torch.tensor([name != "scale" for name, _ in model.named_parameters()])
    assert_norms(model, truth, X)


def test_input_is_written_once_a_call() -> None:
    model = parts(lambda net, x, scale: net.layer(x.sub_(0.5)).tanh() * scale)
    x, scale = inputs(4, 3), inputs(4, 3, seed=1)
    truth = alone(model, (x, scale))
    for _ in range(2):
        given = x.clone()
        assert_exact(features_of_squares(model)(given, scale)[1], truth)
        given = x.clone()
        assert_exact(recorded(model, lambda given=given: model(given, scale).square().sum()), truth)
        torch.testing.assert_close(given, x - 0.5)


class Cache:
    """Keys that modules add to, as in a model that can go on with its sequence; it holds a reference to itself."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.steps, self.own = {"seen": 0}, self

    def update(self, keys: Tensor) -> Tensor:
        self.keys.append(keys)
        self.steps["seen"] += 1
        return torch.cat(self.keys, 1)


def cached(net: Any, x: Tensor, cache: Cache | None = None) -> Tensor:
    """Two steps that are given a cache; another path where the first value is positive."""
    cache = Cache() if cache is None else cache
    for _ in range(2):
        keys = net.layer(x) if x[0, 0, 0] > 0 else net.layer(x) * 1.0
        x = x + (keys.tanh() @ cache.update(keys).sum(1, keepdim=True).mT) * net.scale
    return net.head(x[:, -1])


@pytest.mark.parametrize("samples", [1, 3])
def test_a_cache_among_the_inputs_is_filled_once(samples: int) -> None:
    model, x = parts(cached), inputs(samples, 5, 3)
    truth = alone(model, (x,))
    for _ in range(2):
        assert_exact(features_of_squares(model)(x)[1], truth)
        cache = Cache()
        with fastgrad.record(model):
            out = model(x, cache=cache)
            found = fastgrad.grad_sqnorm(out.square().sum(), list(model.parameters()))
        assert_exact(torch.stack(found, 1), truth)
        assert cache.steps == {"seen": 2}
        assert [len(keys) for keys in cache.keys] == [samples, samples]
        assert cache.own is cache


@pytest.mark.parametrize("given", [{"b"}, ["b"], {"a": "b"}, type("List", (list,), {})(["b"])])
def test_containers_among_inputs(given: Any) -> None:
    def forked(net: Any, x: Tensor, names: Any) -> Tensor:
        assert names == given
        names.clear()
        return net.head(net.layer(x) if x[0, 0] > 0 else net.layer(x) * 1.0)

    model = parts(forked)
    for _ in range(2):
        features_of_squares(model)(X, names=copy.deepcopy(given))
        recorded(model, lambda: model(X, names=copy.deepcopy(given)).sum())


@pytest.mark.parametrize("way", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_weights_kept_between_passes(way: Any) -> None:
    model = nn.Sequential(way(nn.Conv1d(2, 4, 2)), nn.Flatten(), nn.Tanh(), way(nn.Linear(8, 3))).double()
    x = inputs(4, 2, 3)
    truth = loss_norms((model(row).square().sum() for row in x.split(1)), model)
    with nn.utils.parametrize.cached():
        weight = model[3].weight
        for _ in range(2):
            assert_norms(model, truth, x)
        assert model[3].weight is weight
        model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
