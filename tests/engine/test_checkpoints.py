"""Checkpoints inside a model: exact, by rules, and each block called twice for all samples together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms
from small_nets import Net, assert_exact, check_losses, inputs, recorded, routes
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as any_checkpoint

import fastgrad

pytestmark = pytest.mark.skipif(
    hasattr(torch.utils.checkpoint, "_NoopSaveInputs"),
    reason="vmap refuses checkpoints of this release of PyTorch; samples run one by one",
)
X = inputs(4, 5, 6)
B = len(X)
checkpoint = functools.partial(any_checkpoint, use_reentrant=False)
MATRICES = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


class Block(nn.Module):
    """A norm, two layers, a parameter that no rule serves, and a count of calls."""

    def __init__(self, inplace: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale, self.act, self.drop = nn.Parameter(torch.rand(6)), nn.ReLU(inplace), nn.Dropout(dropout)
        self.counts = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.counts[0] += 1
        return x + self.drop(self.down(self.act(self.up(self.norm(x)))) * self.scale)


def net(function: Callable[..., Tensor], **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(function, first=Block(**options), second=Block(**options), head=nn.Linear(6, 2)).double()


def plain(net: Any, x: Tensor) -> Tensor:
    return net.head(net.second(net.first(x)))


def each(net: Any, x: Tensor, **options: Any) -> Tensor:
    return net.head(checkpoint(net.second, checkpoint(net.first, x, **options), **options))


def closing(net: Any, x: Tensor) -> Tensor:
    gate = net.first(x).sigmoid()
    return net.head(checkpoint(lambda h: net.second(h) * gate, gate))


def named(net: Any, x: Tensor) -> Tensor:
    return net.head(checkpoint(lambda h, by: net.second(h) * by[0], net.first(x), by=[net.first(x).sigmoid()]))


def partly(net: Any, x: Tensor) -> Tensor:
    bound = functools.partial(lambda h, by: net.second(h) * by, by=net.first(x).sigmoid())
    return net.head(checkpoint(bound, net.first(x)))


def masked_inside(net: Any, x: Tensor) -> Tensor:
    """One checkpoint within another, with an argument that has no graph."""

    def part(h: Tensor, mask: Tensor) -> Tensor:
        return checkpoint(lambda h, mask: net.first.scale * h * mask, net.second(h), mask) + mask

    return net.head(checkpoint(part, net.first(x), (x > 0).double()))


def by_path(net: Any, x: Tensor) -> Tensor:
    if bool((x[..., 0] > 0).all()):
        return net.head(checkpoint(net.first, x))
    kept = (x[..., :1] > 0).to(x)
    return net.head(checkpoint(lambda h: net.first(h * kept + h * (1 - kept)), x))


def requiring(net: Any, x: Tensor) -> Tensor:
    """Has the inputs of its checkpoints require gradients, as Hugging Face's models do."""
    return net.head(checkpoint(net.second, net.first(x).requires_grad_()))


def selective(policy: Any, net: Any, x: Tensor) -> Tensor:
    return each(net, x, context_fn=functools.partial(create_selective_checkpoint_contexts, policy))


def norms_too(_: Any, op: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    saved = op in (*MATRICES, torch.ops.aten.native_layer_norm.default, torch.ops.aten.view.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


WAYS: dict[str, Callable[..., Tensor]] = {
    "each": each,
    "around both": lambda net, x: net.head(checkpoint(lambda h: net.second(net.first(h)), x)),
    "one in another": lambda net, x: net.head(checkpoint(lambda h: checkpoint(net.second, checkpoint(net.first, h)),
        x)),
    "one alone in another": lambda net, x: net.head(checkpoint(lambda h: checkpoint(net.second, h), net.first(x))),
    "no graph inside": masked_inside,
    "of a scale": lambda net, x: net.head(checkpoint(lambda h: h * net.first.scale, x)),
    "closing over a sample": closing,
    "named arguments": named,
    "a partial": partly,
    "to its end": functools.partial(each, early_stop=False),
    "without generators": functools.partial(each, preserve_rng_state=False),
    "paths": by_path,
    "inputs that require gradients": requiring,
}  # fmt: skip
SELECTIVE = {"matrices": MATRICES, "norms and views too": norms_too}


def assert_by_rules(model: Net) -> None:
    assert "alone" not in routes(Net(lambda own, x: own.model(x).mean(1), model=model), X).values()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_exact(way: str, inplace: bool) -> None:
    model = net(WAYS[way], inplace=inplace)
    check_losses(model, lambda x: model(x).sin().square().sum((1, 2)), X)
    assert_by_rules(model)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("policy", SELECTIVE)
def test_selective(policy: str, inplace: bool) -> None:
    """In place, PyTorch itself refuses what is stored; such a store bears one backward pass."""
    model = net(functools.partial(selective, SELECTIVE[policy]), inplace=inplace)
    without = net(plain)
    truth = loss_norms((without(row).sin().square().sum() for row in X.split(1)), without)
    for _ in range(2):
        assert_exact(recorded(model, lambda: model(X).sin().square().sum()), truth)
    assert_by_rules(model)


def test_blocks_are_called_twice_for_all_samples() -> None:
    model = net(each)
    recorded(model, lambda: model(X).square().sum())
    model.first.counts[0] = 0
    recorded(model, lambda: model(X).square().sum())
    assert model.first.counts == [2]


def test_several_gradients_and_a_backward_pass_outside() -> None:
    model, gradients = net(each), inputs(3, B, 5, 2)
    with fastgrad.record(model):
        out = model(X)
        found = fastgrad.grad_sqnorm(out, model, grad_outputs=gradients, is_grads_batched=True, retain_graph=True)
        own = [fastgrad.grad_sqnorm(model(X), model, grad_outputs=g) for g in gradients]
        batched = torch.autograd.grad(out, list(model.parameters()), gradients, is_grads_batched=True)
        out = model(X)
    for at, row in enumerate(own):
        for one, several in zip(row, found, strict=True):
            torch.testing.assert_close(several[at], one)
    out.backward(gradients[0])
    for p, several in zip(model.parameters(), batched, strict=True):
        torch.testing.assert_close(several[0], p.grad)


@pytest.mark.parametrize("way", ["each", "around both", "one in another"])
def test_dropout_is_drawn_as_in_an_ordinary_step(way: str) -> None:
    model, without = net(WAYS[way], dropout=0.4), net(plain, dropout=0.4)
    with fastgrad.record(model):
        model(X)  # the first call runs the model ordinarily too
    torch.manual_seed(1)
    with fastgrad.record(model):
        losses = model(X).square().sum((1, 2))
        found = torch.stack(fastgrad.grad_sqnorm(losses, model, retain_graph=True), 1)
        losses.sum().backward(retain_graph=True)
        assert_exact(found, loss_norms(losses, model))
    torch.manual_seed(1)
    without(X).square().sum().backward()
    for own, p in zip(model.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(own.grad, p.grad)


def test_frozen_parameters() -> None:
    model = net(each)
    truth = loss_norms((model(row).sin().square().sum() for row in X.split(1)), model)
    model.first.requires_grad_(False)
    assert_exact(recorded(model, lambda: model(X).sin().square().sum()), truth)


@pytest.mark.parametrize("way", ["list", "inside", "attribute", "function"])
def test_samples_run_alone_where_something_keeps_them(way: str) -> None:
    """What is kept becomes the batch's, which a checkpoint that closes over it could not use."""
    seen: list[Any] = []
    functions: list[Callable[[], Tensor]] = []

    def keeping(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        if way == "list":
            seen.append(h)
        elif way == "inside":
            return net.head(checkpoint(lambda h: net.second(seen.append(h) or h), h))
        elif way == "attribute":
            net.seen = h
        else:
            functions.append(lambda: h)
        return net.head(checkpoint(lambda: net.second(h)))

    model = net(keeping)
    truth = loss_norms((model(row).square().sum() for row in X.split(1)), model)
    assert_exact(recorded(model, lambda: model(X).square().sum()), truth)
    assert model.first.counts[0] >= B
    assert all(t.isfinite().all() for t in seen[-B:])  # the first try, which is given up, left one before


@pytest.mark.parametrize("container", [False, True])
def test_an_attribute_that_only_the_backward_pass_leaves_holds_rows(container: bool) -> None:
    """As with an ordinary step, whose checkpoint leaves there what it computed again."""

    def passing(net: Any, x: Tensor) -> Tensor:
        def part(h: Tensor) -> Tensor:
            if container:
                net.seen.append(net.second(h))
                return net.seen[-1].sin()
            net.seen = net.second(h)
            return net.seen.sin()

        out = net.head(checkpoint(part, net.first(x)))
        if container:
            net.seen.clear()
        else:
            net.seen = None
        return out

    found = []
    for context in (fastgrad.record, contextlib.nullcontext):
        model = net(passing)
        model.seen = []
        with context(model):
            model(X).square().sum().backward()
        found.append(model.seen[-1] if container else model.seen)
    torch.testing.assert_close(*found)


def test_an_argument_that_is_written_to_later() -> None:
    """PyTorch's own error, which vmap would hide."""

    def writing(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        out = checkpoint(net.second, h)
        h.add_(1)
        return net.head(out)

    model = net(writing)
    with fastgrad.record(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(X).sum().backward()


def test_memory_of_blocks_is_that_of_their_inputs() -> None:
    def saved(model: Net) -> int:
        """Bytes that the graph holds outside of checkpoints, whose own hooks are inside of these."""
        storages = {}

        def pack(t: Tensor) -> Tensor:
            whole = torch._C._functorch.get_unwrapped(t) if torch._C._functorch.is_functorch_wrapped_tensor(t) else t
            storages[whole.untyped_storage().data_ptr()] = whole.untyped_storage().nbytes()
            return t

        with fastgrad.record(model):
            model(X)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = model(X)
        assert out.requires_grad
        return sum(storages.values())

    assert saved(net(each)) < saved(net(plain)) / 2
