"""The private copy: what it holds in place of parameters, and how its attention and batch norms compute."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import types
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms, relative_error, true_norms
from small_nets import Net, assert_exact, check_losses, recorded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgrad
from fastgrad.blocks import Logits
from fastgrad.blocks.extraction import Extraction
from fastgrad.engine.copy import Shadow
from fastgrad.engine.network import Network
from fastgrad.engine.run import Run


def scattered() -> Net:
    """One parameter under two names, in a list and in the module of another."""
    scale, shift = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(1, 4))
    return Net(
        lambda net, x: net.head(torch.tanh(x * net.plain[0] + net.plain[1]["shift"]) * net.same),
        scale=scale,
        same=scale,
        shift=shift,
        plain=[scale, {"shift": shift}],
        head=nn.Linear(4, 3),
    )


def test_a_parameter_is_replaced_wherever_it_occurs() -> None:
    model = scattered()
    model.bound, model.part = model.head.forward, functools.partial(F.linear, weight=model.head.weight)
    value = torch.ones(4)
    copy = Shadow(model, lambda p: value if p is model.scale else p.detach()).root
    assert copy.bound.__self__ is copy.head
    assert copy.part.keywords["weight"] is copy.head.weight
    assert copy.scale is copy.same is copy.plain[0] is value
    assert copy.plain[1]["shift"] is copy.shift
    assert model.plain[0] is model.scale


@pytest.mark.parametrize("apart", [False, True])
def test_what_holds_no_part_of_a_model_is_not_looked_through_item_by_item(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, looks, replace = nn.Linear(4, 3), [], Shadow._replace
    model.words = [str(number) for number in range(1000)]
    model.numbers = {word: number for number, word in enumerate(model.words)}
    monkeypatch.setattr(Shadow, "_replace", lambda own, value: looks.append(value) or replace(own, value))
    copy = Shadow(model, apart=apart).root
    assert len(looks) < 100
    for name in ("words", "numbers"):
        assert getattr(copy, name) == getattr(model, name)
        assert (getattr(copy, name) is getattr(model, name)) is not apart


def test_a_graph_of_torch_fx() -> None:
    """Its class belongs to this graph alone, and makes another for each new object."""
    torch.manual_seed(0)
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    check_losses(model, lambda x: model(x).square().sum(1), torch.randn(5, 4).double())


def test_broadcast_parameters_in_plain_attributes_are_exact() -> None:
    torch.manual_seed(0)
    model, x = scattered().double().eval(), torch.randn(5, 4, dtype=torch.float64)
    extractor = fastgrad.GradientFeatures(model, loss="mse")
    logits, features = extractor(x)
    assert [r.route for r in extractor.report()[:2]] == ["broadcast", "broadcast"]
    truth = true_norms(model, (x,), lambda i, _: 2 * (logits[i : i + 1] - 1))
    assert relative_error(features, truth, 2.0**-52).max() <= 500 * 2.0**-52


def test_a_recording_leaves_lists_of_parameters_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = scattered().double(), torch.randn(5, 4).double()
    for samples in (5, 3):
        with fastgrad.record(model):
            found = fastgrad.grad_sqnorm(model(x[:samples]).square().sum(), list(model.parameters()))
        assert model.plain[0] is model.scale
        assert model.plain[1]["shift"] is model.shift
        truth = loss_norms((row.square().sum() for row in model(x[:samples])), model)
        torch.testing.assert_close(torch.stack(found, 1), truth)


class Own(nn.TransformerEncoderLayer):
    """A layer whose own forward asks for the mode."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.dropout(self.linear2(self.linear1(x)), 0.5, self.training)


@pytest.mark.parametrize("way", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_weights_that_are_kept_for_a_while_are_those_of_each_pass(way: Any) -> None:
    """`parametrize.cached` keeps them by the user's module, whose copies come and go."""
    torch.manual_seed(0)
    model = nn.Sequential(way(nn.Conv1d(2, 4, 2)), nn.Flatten(), nn.Tanh(), way(nn.Linear(8, 3))).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    truth = loss_norms((model(row).square().sum() for row in x.split(1)), model)
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    with nn.utils.parametrize.cached():
        kept = model[3].weight
        for _ in range(2):
            assert_exact(recorded(model, lambda: model(x).square().sum()), truth)
            assert_exact(fastgrad.GradientFeatures(model, loss="mse")(x, target=zeros)[1], truth)
        assert model[3].weight is kept
        model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weights_that_another_thread_keeps_are_left_to_it() -> None:
    """They may be read, and their time end, while a pass of another model is under way."""
    other = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    kept: list[Tensor] = []

    def meanwhile(*_: Any) -> None:
        if len(kept) == 1:
            with ThreadPoolExecutor(1) as pool:
                kept.append(pool.submit(lambda: other.weight).result())
                pool.submit(time.close).result()

    model = nn.Sequential(nn.Linear(3, 2))
    model[0].register_forward_hook(meanwhile)
    with contextlib.ExitStack() as time:
        time.enter_context(nn.utils.parametrize.cached())
        kept.append(other.weight)
        fastgrad.GradientFeatures(model)(torch.randn(4, 3))
    assert kept[1] is kept[0]
    with nn.utils.parametrize.cached():
        assert other.weight is not kept[0]


def test_attention_with_a_forward_of_its_own_keeps_the_mode() -> None:
    torch.manual_seed(0)
    model, x = Own(8, 2, 16).eval(), torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(Network(model).forward(None, Run(3), (x,), {}), model(x))


def keeping(net: Any, x: Tensor) -> Tensor:
    """Keeps in its attributes what it computes."""
    if "weight" not in net.cache:
        net.cache["weight"] = net.layer.weight * 2
    net.seen.append(x)
    return x @ net.cache["weight"].T + net.layer.bias


class Keeping(nn.Module):
    """Reads what hooks on its layers keep in its own attributes."""

    def __init__(self, way: str, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), second, nn.Linear(8, 2)
        self.kept: Any = {}
        for name in ("first", "second"):
            hook: Any = functools.partial(self.keep, name)
            if way == "closure":
                hook = lambda module, _, output: self.kept.update({len(self.kept): output})  # noqa: E731
            getattr(self, name).register_forward_hook(hook)

    def keep(self, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        self.kept = {**self.kept, name: output}

    def forward(self, x: Tensor) -> Any:
        self.kept.clear()
        self.second(torch.tanh(self.first(x)))
        return self.head(torch.cat([*self.kept.values()], 1).tanh())


@pytest.mark.parametrize("second", [nn.Linear(4, 4), nn.BatchNorm1d(4)])
@pytest.mark.parametrize("way", ["closure", "method"])
def test_what_hooks_keep_in_a_model_is_kept_in_the_copy(way: str, second: nn.Module) -> None:
    torch.manual_seed(0)
    model = Keeping(way, copy.deepcopy(second)).double().eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(2):
        check_losses(model, lambda x: model(x).square().sum(1), x)
        truth = loss_norms(((model(row) - 1).square().sum() for row in x.split(1)), model)
        assert_exact(fastgrad.GradientFeatures(model, loss="mse")(x)[1], truth)


def collecting(net: Any, x: Tensor) -> Tensor:
    """Adds hooks in its first call, which collect what layers give, as transformers do for hidden states."""
    if not net.hooked:
        for part in (net, net.first, net.second):
            part.register_forward_hook(lambda _, __, output: collected.append(output))
        net.hooked = True
    collected.clear()
    out = net.head(torch.tanh(net.second(torch.tanh(net.first(x)))))
    return out + torch.stack(collected, 1).mean(2) @ net.weights


collected: list[Tensor] = []


def test_hooks_that_a_call_adds_are_added_once() -> None:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(3, 4), "second": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    model = Net(collecting, hooked=False, weights=nn.Parameter(torch.randn(2, 2)), **parts).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    _, features = fastgrad.GradientFeatures(model, loss="mse")(x)
    assert not model.hooked
    assert not any(part._forward_hooks for part in model.modules())
    # A hook of the model itself, added by its forward, begins with the next call.
    for count in (2, 3):
        with fastgrad.record(model):
            out = model(x)
            assert len(collected) == count
            found = fastgrad.grad_sqnorm((out - 1).square().sum(), list(model.parameters()))
        assert model.hooked
        assert [len(part._forward_hooks) for part in model.modules()] == [1, 1, 1, 0]
        assert_exact(torch.stack(found, 1), features)
    truth = loss_norms(((model(row) - 1).square().sum() for row in x.split(1)), model)
    assert_exact(features, truth)


class Replacing(nn.Module):
    """Adds a hook in its first call, or another one in each, whose handle it keeps."""

    def __init__(self, each: bool, many: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.each, self.many = each, many
        self.handles: Any = [] if many else None
        self.kept: Any = None
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.each and self.handles:
            self.remove()
        if not self.handles:
            handle = self.first.register_forward_hook(self.keep, with_kwargs=True)
            self.handles = [handle] if self.many else handle
        self.first(x)
        return self.head(torch.tanh(self.kept))

    def keep(self, _: nn.Module, __: Any, ___: Any, output: Tensor) -> None:
        self.kept = output if self.kept is None or not self.each else self.kept
        self.count += 1

    def remove(self) -> None:
        for handle in self.handles if self.many else [self.handles]:
            handle.remove()
        self.handles = [] if self.many else None


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_hooks_that_calls_add_and_remove_are_those_of_the_model(each: bool, many: bool) -> None:
    torch.manual_seed(0)
    model = Replacing(each, many).double()
    kept = model.first.register_forward_hook(lambda *_: None)
    for seed in range(3):
        x, model.count = torch.randn(4, 3, dtype=torch.float64), 0
        found = recorded(model, functools.partial(_run, model, x))
        assert model.count == 1, seed
        assert_exact(found, torch.cat([loss_norms([_run(model, row)], model) for row in x.split(1)]))
        assert len(model.first._forward_hooks) == 2
        assert len(model.first._forward_hooks_with_kwargs) == 1
    model.remove()
    assert list(model.first._forward_hooks) == [kept.id]
    assert not model.first._forward_hooks_with_kwargs
    kept.remove()
    assert not model.first._forward_hooks


def _run(model: Replacing, row: Tensor) -> Tensor:
    model.kept = None
    return model(row).square().sum()


def test_lists_and_dicts_of_the_model_are_its_own() -> None:
    model, x = Net(keeping, layer=nn.Linear(3, 2), seen=[], cache={}).double(), torch.randn(5, 3).double()
    rows = (model(x)[i].sum() for i in range(5) if model.cache.clear() is None)
    truth = loss_norms(rows, model)[:, 0]
    model.cache.clear()
    model.seen.clear()
    _, features = fastgrad.GradientFeatures(model, loss="mse", target=lambda z: z.detach() - 0.5)(x)
    assert not model.cache
    assert not model.seen
    assert torch.allclose(features[:, 0], truth)
    with fastgrad.record(model):
        found = fastgrad.grad_sqnorm(model(x).sum(), model.layer.weight)[0]
    # The user's own call fills them, once.
    assert torch.allclose(found, truth)
    assert len(model.seen) == 1


def down(net: Any, x: Tensor) -> Tensor:
    """Leaves for a later part what it gives, computed by one layer that is used twice."""
    net.skips.append(net.layer(net.layer(x).tanh()))
    return net.skips[-1].tanh()


def up(net: Any, x: Tensor) -> Tensor:
    return net.layer(x + net.skips.pop())


@pytest.mark.parametrize("whole", [False, True])
def test_a_list_that_parts_share_is_one(whole: bool) -> None:
    torch.manual_seed(0)
    skips: list[Tensor] = []
    parts = [Net(function, layer=nn.Linear(3, 3), skips=skips) for function in (down, down, up, up)]
    if whole:
        # Then the model as a whole is computed again.
        parts[1].layer = parts[0].layer
    model = nn.Sequential(*parts).double()
    for samples in (4, 3):
        x = torch.randn(samples, 3).double()
        check_losses(model, lambda x: model(x).square().sum(1), x)
        _, features = fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z))(x)
        assert_exact(features, loss_norms((model(row).square().sum() for row in x.split(1)), model))
        assert not skips


def taking(net: Any, x: Tensor) -> Tensor:
    return net.layer(x) * net.context["scale"]


def giving(net: Any, x: Tensor) -> Tensor:
    """Gives its part a number by a dict, or leaves that to a hook."""
    if not net.by_hook:
        net.context["scale"] = net.scale
    return net.part(net.head(x))


@pytest.mark.parametrize("by_hook", [False, True])
def test_a_dict_that_parts_share_is_one(by_hook: bool) -> None:
    torch.manual_seed(0)
    context: dict[str, Any] = {}
    part = Net(taking, layer=nn.Linear(3, 2), context=context)
    model = Net(giving, part=part, context=context, head=nn.Linear(3, 3), scale=1.0, by_hook=by_hook).double()
    if by_hook:
        model.head.register_forward_hook(lambda *_: context.update(scale=model.scale))
    x = torch.randn(4, 3).double()
    for model.scale in (1.0, 3.0):
        truth = loss_norms((row.square().sum() for row in model(x)), model)
        # Of an earlier call.
        context["scale"] = 2.0
        assert_exact(fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z))(x)[1], truth)
        assert context["scale"] == 2.0
        assert_exact(recorded(model, lambda: model(x).square().sum()), truth)
        assert context["scale"] == model.scale


def closing(way: str) -> Net:
    """A function in an attribute, or in the place of ``forward``, that holds parts of the model."""
    inner, head, scale, steps = nn.Linear(3, 3), nn.Linear(3, 2), nn.Parameter(torch.rand(3)), [1, 2]
    model = Net(lambda net, x: net.head(net.inner(x)), inner=inner, head=head, scale=scale, steps=steps)
    own = inner.forward
    functions: dict[str, Any] = {
        "model": lambda x, *, power=2: torch.tanh(model.inner(x)) * model.scale**power,
        "parts": lambda x: torch.tanh(inner(x)) * scale,
        "list": lambda x: x if steps.append(len(steps)) else torch.tanh(inner(x)) * scale,
        "method": lambda x: own(x.sin()),
    }
    if way == "compiled":
        method = types.MethodType(lambda net, x: torch.tanh(net.inner(x)) * net.scale, model)
        model.middle = torch.compile(method, backend="eager")
        model.function = lambda net, x: net.head(net.middle(x))
    elif way == "in a list":
        model.middle, model.function = [functions["parts"]], lambda net, x: net.head(net.middle[0](x))
    elif way == "method":
        inner.forward = functions[way]  # type: ignore[method-assign]
    else:
        model.middle, model.function = functions[way], lambda net, x: net.head(net.middle(x))
    return model


@pytest.mark.parametrize("way", ["model", "parts", "list", "method", "in a list", "compiled"])
def test_closures_hold_copies(way: str) -> None:
    torch.manual_seed(0)
    model, x = closing(way).double(), torch.randn(4, 3).double()
    before = vars(model).get("middle"), vars(model.inner).get("forward")
    check_losses(model, lambda x: model(x).square().sum(1), x)
    steps = len(model.steps)
    _, features = fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z))(x)
    assert len(model.steps) == steps
    assert_exact(features, loss_norms((row.square().sum() for row in model(x)), model))
    assert (vars(model).get("middle"), vars(model.inner).get("forward")) == before


def test_a_hook_writes_to_a_dict_that_holds_a_module() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    kept: dict[str, Any] = {"layer": layer}
    model = Net(lambda net, x: net.layer(x), layer=layer, kept=kept)
    layer.register_forward_hook(lambda *given: kept.update(output=given[2].detach()))
    recorded(model, lambda: model(x).sum())
    assert torch.equal(kept["output"], layer(x))


def stepping(way: str) -> Net:
    """Goes another way from its second call on."""
    torch.manual_seed(0)
    model = Net(lambda net, x: net.step(x), one=nn.Linear(3, 3), two=nn.Linear(3, 3)).double()
    steps: dict[str, Callable[..., Any]] = {
        "closure": lambda x: x if setattr(model, "step", lambda x: model.two(x)) else model.one(x),
        "method": types.MethodType(lambda net, x: x if setattr(net, "step", net.two.forward) else net.one(x), model),
    }
    model.step = steps[way]
    return model


@pytest.mark.parametrize("way", ["closure", "method"])
def test_a_function_that_a_call_replaces_is_replaced(way: str) -> None:
    model, plain, x = stepping(way), stepping(way), torch.randn(4, 3).double()
    for _ in range(2):
        truth = loss_norms((row.square().sum() for row in plain(x)), plain)
        assert_exact(recorded(model, lambda: model(x).square().sum()), truth)


def test_wrappers_of_what_a_compiler_has_seen_are_no_such_functions() -> None:
    """They have its attributes by `functools.wraps`, and would be lost."""
    model = Net(lambda net, x: net.head(net.middle(x) + x), inner=nn.Linear(3, 3), head=nn.Linear(3, 2)).double()
    seen = torch.compiler.disable(types.MethodType(lambda net, x: net.inner(x), model))
    model.middle = torch.no_grad()(seen)
    assert model.middle._torchdynamo_orig_callable
    x = torch.randn(4, 3).double()
    for call in (lambda: recorded(model, lambda: model(x).sum()), lambda: fastgrad.GradientFeatures(model)(x)):
        with pytest.raises(ValueError, match=r"must reach 'inner\.weight'"):
            call()


#: By what they count in: how it begins, and what a call does to it.
COUNTS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "object": (lambda: types.SimpleNamespace(count=0), lambda it: setattr(it, "count", it.count + 1)),
    "object with a list": (lambda: types.SimpleNamespace(seen=[]), lambda it: it.seen.append(1)),
    "object in a list": (lambda: [types.SimpleNamespace(count=0)], lambda it: setattr(it[0], "count", it[0].count + 1)),
    "object in a dict": (lambda: {0: types.SimpleNamespace(seen=set())}, lambda it: it[0].seen.add(len(it[0].seen))),
    "deque": (lambda: deque(maxlen=9), lambda it: it.append(1)),
    "counter": (Counter, lambda it: it.update("a")),
    "defaultdict": (lambda: defaultdict(int), lambda it: it.update(a=it["a"] + 1)),
    "defaultdict of lists": (lambda: defaultdict(list, a=[1]), lambda it: it["a"].append(1)),
}


def noting(net: Any, x: Tensor) -> Tensor:
    net.note(net.held)
    return net.head(torch.tanh(net.layer(torch.tanh(net.layer(x)))))


@pytest.mark.parametrize("kind", COUNTS)
def test_what_a_call_counts_is_counted_once(kind: str) -> None:
    begin, note = COUNTS[kind]
    held, once = begin(), begin()
    # A layer that is used twice is computed again in the backward pass.
    model = Net(noting, layer=nn.Linear(3, 3), head=nn.Linear(3, 2), note=note, held=held)
    x = torch.randn(5, 3)
    for count in (lambda: fastgrad.GradientFeatures(model)(x), lambda: recorded(model, lambda: model(x).sum())):
        count()
        note(once)
        assert held == once
    assert model.held is held


@dataclasses.dataclass(eq=False)
class Scale:
    """What others may hold as well."""

    scale: Any = 1.0
    factor: float = 0.0

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale


class Scaled(torch.autograd.Function):
    """Scales gradients by what the object holds when they come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Scale) -> Tensor:
        ctx.held = held
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.held.factor * gradients[0], None


def scaling(use: Callable[[Any, Tensor], Tensor], net: Any, x: Tensor) -> Tensor:
    net.held.scale, net.held.factor = 1 + x.square().mean(1, keepdim=True), 2.0
    return net.second(use(net, net.first(x)))


NONE = Scale()
#: Of models whose attribute is an object, those that get at it another way as well.
WAYS: dict[str, Callable[[], Net]] = {
    "hook": lambda: noted_by_hook(types.SimpleNamespace()),
    "method": lambda: scaled(lambda net, x: net.use(x), lambda held: held.apply),
    "holder": lambda: scaled(lambda net, x: net.use.held.apply(x), lambda held: types.SimpleNamespace(held=held)),
    "gradient": lambda: scaled(lambda net, x: Scaled.apply(x, net.held), lambda _: None),
    "key": lambda: scaled(lambda net, x: net.use[net.held](x), lambda held: {held: torch.tanh}),
    "identity": lambda: Net(
        lambda net, x: net.second(torch.tanh(net.first(x)) if net.held is NONE else net.first(x)),
        first=nn.Linear(3, 3), second=nn.Linear(3, 2), held=NONE,
    ),
}  # fmt: skip


def scaled(use: Callable[[Any, Tensor], Tensor], made: Callable[[Scale], Any]) -> Net:
    held = Scale()
    parts = {"first": nn.Linear(3, 3), "second": nn.Linear(3, 2)}
    return Net(functools.partial(scaling, use), held=held, use=made(held), **parts)


def noted_by_hook(held: Any) -> Net:
    model = Net(lambda net, x: net.second(torch.tanh(net.first(x)) + net.held.noted), first=nn.Linear(3, 3), held=held)
    model.second = nn.Linear(3, 2)
    model.first.register_forward_hook(lambda _, __, output: setattr(held, "noted", output))
    return model


@pytest.mark.parametrize("way", WAYS)
def test_an_object_that_is_held_elsewhere_as_well_stays_one(way: str) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    # Another one, whose object is not that of a first call.
    model, other = WAYS[way]().double(), WAYS[way]().double()
    other.load_state_dict(model.state_dict())
    truth = loss_norms(other(x).square().sum(1), other)
    _, features = fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z))(x)
    assert_exact(features, truth)
    assert_exact(recorded(model, lambda: model(x).square().sum()), truth)


def test_a_tensor_of_few_numbers_in_a_large_shape_is_not_copied() -> None:
    mask = torch.zeros(1, 1).expand(2**30, 2**20)
    model = Net(lambda net, x: net.layer(x) + net.mask[0, 0], layer=nn.Linear(3, 2), mask=mask)
    recorded(model, lambda: model(torch.randn(5, 3)).square().sum())


def test_a_tensor_that_is_no_buffer_is_counted_in_once() -> None:
    model = Net(lambda net, x: net.layer(x * net.count.add_(1)), layer=nn.Linear(3, 2), count=torch.zeros(()))
    recorded(model, lambda: model(torch.randn(5, 3)).square().sum())
    assert model.count == 1


@pytest.mark.parametrize("zero", [False, True])
def test_parameters_can_be_swapped_once_they_were_used(zero: bool) -> None:
    model, other = (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval() for _ in range(2))
    x = torch.randn(5, 4, dtype=torch.float64)
    if zero:
        nn.init.zeros_(model[2].weight)
    features = fastgrad.GradientFeatures(model)
    features(x)
    expected = fastgrad.GradientFeatures(other)(x)[1]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(one, two)
    torch.testing.assert_close(features(x)[1], expected)


class Products(TorchDispatchMode):
    """Counts matrix products by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def encoder(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    mixed, _ = net.attention(x, x, x, need_weights=False)
    return net.head(net.second(x + mixed).mean(1))


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_is_one_product_and_not_one_a_position(frozen: bool) -> None:
    torch.manual_seed(0)
    model = Net(
        encoder,
        first=nn.LayerNorm(8),
        second=nn.LayerNorm(8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, 3),
    )
    model.eval().requires_grad_(not frozen)
    extraction, x = Extraction(model, [Logits()]), torch.randn(4, 7, 8)
    extraction(x)
    with Products() as products:
        extraction(x)
    assert products.seen["bmm"] == 0
    assert products.seen["addmm"] >= 2
    assert all(p.requires_grad is not frozen for p in model.parameters())


def tokens(net: Any, x: Tensor) -> Tensor:
    """Convolutional features as a sequence of tokens, tokens first, as PyTorch's attention takes them by default."""
    tokens = net.norm(net.convolution(x)).flatten(2).permute(2, 0, 1)
    return net.head(net.token(tokens).tanh().sum(0))


def test_one_sample_has_the_norms_that_it_has_in_a_batch() -> None:
    """Its gradient reaches the batch norm channels last, where PyTorch's own gradients on a CPU are wrong."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model = Net(tokens, convolution=convolution, norm=norm, token=nn.Linear(4, 4), head=nn.Linear(4, 3))
    model.double().eval()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    extractor = fastgrad.GradientFeatures(model)
    _, together = extractor(x)
    alone = torch.cat([extractor(one[None])[1] for one in x])
    torch.testing.assert_close(alone, together, rtol=1e-10, atol=0)
    truth = loss_norms(model(x).square().sum(1), model)[:, 0]
    for one, norm in zip(x, truth, strict=True):
        with fastgrad.record(model):
            loss = model(one[None]).square().sum()
            (found,) = fastgrad.grad_sqnorm(loss, [model.convolution.weight])
        torch.testing.assert_close(found[0], norm, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("shape", [(2, 3, 1, 4), (1, 3, 4, 2), (2, 3, 4, 2)])
def test_gradients_pass_norms_in_any_layout(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    """Where the input or the gradient lies transposed, PyTorch's own gradients on a CPU are wrong."""
    torch.manual_seed(0)
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    z = x.clone().requires_grad_()
    mean, var = (
        (0, 1) if kind is nn.BatchNorm2d else (z.mean((2, 3), True), z.var((2, 3), unbiased=False, keepdim=True))
    )
    (truth,) = torch.autograd.grad((z - mean) / (torch.zeros_like(z) + var + 1e-5).sqrt(), z, g)
    for orders in itertools.product(itertools.permutations(range(4)), repeat=2):
        one, at = (
            t.permute(order).contiguous().permute(*map(order.index, range(4)))
            for t, order in zip((x, g), orders, strict=True)
        )
        one.requires_grad_()
        (found,) = torch.autograd.grad(Shadow(kind(3).double()).root(one), one, at)  # type: ignore[call-arg]
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


def lying(net: Any, x: Tensor) -> Tensor:
    """A batch norm whose input lies transposed, as does its gradient."""
    h = net.norm((x * net.scale).transpose(1, 2).contiguous().transpose(1, 2))
    return net.head(h.transpose(2, 3).contiguous().tanh().transpose(2, 3).flatten(1))


def test_graphs_pass_norms_in_any_layout() -> None:
    torch.manual_seed(0)
    model = Net(lying, norm=nn.BatchNorm2d(3), scale=nn.Parameter(torch.rand(3, 1, 1)), head=nn.Linear(12, 2))
    extractor, x = fastgrad.GradientFeatures(model.double().eval()), torch.randn(5, 3, 4, 1, dtype=torch.float64)
    graph = extractor.trace(x[:2])
    truth = torch.stack([extractor(one.expand(2, 3, 4, 1))[1][0] for one in x])
    for features in (extractor(x)[1], graph(x)[1]):
        torch.testing.assert_close(features, truth, rtol=1e-9, atol=1e-12)


class ByHand(nn.GroupNorm):
    """Without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


@pytest.mark.parametrize("kind", [nn.GroupNorm, ByHand])
@pytest.mark.parametrize("size", [1, 2])
def test_group_norms_of_channels_last(kind: type[nn.GroupNorm], size: int) -> None:
    """Where their input needs no gradient, PyTorch's own end the process."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(2, 4), nn.Conv2d(4, 6, 1), kind(2, 6), nn.Flatten(), nn.Linear(6 * size**2, 3)).double()
    x = torch.randn(3, 4, size, size, dtype=torch.float64)
    truth = loss_norms(model(x).square().sum(1), model)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert_exact(recorded(model, lambda: model(x).square().sum()), truth)
    _, features = fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z))(x)
    assert_exact(features, truth)
