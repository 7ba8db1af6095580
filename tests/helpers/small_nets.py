"""Small networks of parts and a function, and the norms of every way to them held against each sample alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from gradient_oracle import loss_norms, relative_error
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastgrad


class Net(nn.Module):
    """A network with the attributes ``parts``, that gives ``function(network, *inputs)``."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


def parts(function: Callable[..., Any], **more: Any) -> Net:
    """A network in float64 and evaluation mode with two layers of three numbers, a head of two, and bare parameters."""
    made = {"layer": nn.Linear(3, 3), "other": nn.Linear(3, 3), "head": nn.Linear(3, 2)}
    bare = {"scale": nn.Parameter(torch.rand(3) + 0.5), "matrix": nn.Parameter(torch.randn(3, 3))}
    return Net(function, **{**made, **bare, **more}).double().eval()


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """``(B, P)``: squared norms of all parameters from ``record``, for a loss that is computed inside."""
    with fastgrad.record(model):
        return torch.stack(fastgrad.grad_sqnorm(loss(), list(model.parameters())), 1)


def assert_exact(found: Tensor, truth: Tensor) -> None:
    """Compare norms ``(B, P)`` in float64."""
    assert found.shape == truth.shape
    assert relative_error(found, truth, 2e-16).max() < 1e-10


def squares(out: Any) -> Tensor:
    """The sum of squares of all that a model returns."""
    floats = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    return sum((t.abs().square().sum() for t in floats), torch.zeros(()))


def check_losses(model: nn.Module, losses: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compare ``record`` for the losses ``(B,)`` of a batch, or their sum, with the losses of each sample alone."""
    truth = loss_norms((losses(row).sum() for row in x.split(1)), model)
    assert_exact(recorded(model, lambda: losses(x).sum()), truth)


def one_by_one(model: nn.Module, args: Sequence[Any]) -> list[Any]:
    """What a copy of the model gives for each sample alone; inputs with as many rows as the first are cut."""
    samples = next(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)).shape[0]
    outputs = []
    for i in range(samples):
        own, cut = copy.deepcopy(model, {id(p): p for p in model.parameters()}), {}
        for t in (t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)):
            cut[id(t)] = (t[i : i + 1] if t.dim() and t.shape[0] == samples else t).clone()
        outputs.append(own(*pytree.tree_map_only(Tensor, functools.partial(_of, cut), tuple(args))))
    return outputs


def _of(cut: dict[int, Tensor], t: Tensor) -> Tensor:
    return cut[id(t)]


def alone(model: nn.Module, args: Sequence[Any]) -> Tensor:
    """``(B, P)``: norms of the gradients of each sample's sum of squares, alone."""
    none = 0 * sum(p.sum() for p in model.parameters())
    return loss_norms((squares(out) + none for out in one_by_one(model, args)), model)


def features_of_squares(model: nn.Module, chunk_size: int | None = None) -> fastgrad.GradientFeatures:
    return fastgrad.GradientFeatures(model, loss="mse", target=lambda z: torch.zeros_like(z), chunk_size=chunk_size)


def left(model: nn.Module) -> dict[str, Any]:
    """What calls may write to: attributes that are no modules, and values of buffers and parameters."""
    held = {f"{path}.{k}": v for path, m in model.named_modules() for k, v in vars(m).items() if k[0] != "_"}
    tensors = {name: t.detach().clone() for name, t in (*model.named_buffers(), *model.named_parameters())}
    return {k: copy.copy(v) for k, v in held.items() if type(v) in (int, float, str, bool, list, dict, set)} | tensors


def assert_same(found: Any, expected: Any) -> None:
    """Compare trees of values, tensors up to rounding."""
    one, other = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-12)
        else:
            assert a == b or isinstance(a, type(b))


def check(
    model: nn.Module,
    *calls: Sequence[Any],
    states: Iterable[dict[str, Any]] = (),
    features: bool = True,
    apart: bool = False,
) -> None:
    """Every call, by recording, by features and by features of chunks, against each sample alone.

    Before each call its state's attributes are set on the model. A recorded call leaves and returns what an ordinary
    one does, and one of features leaves the model as it was. If samples take paths ``apart``, outputs are those of each
    alone.
    """
    extractors = [features_of_squares(model), features_of_squares(model, chunk_size=2)] if features else []
    given = iter(states)
    for args in calls:
        vars(model).update(next(given, {}))
        truth, before = alone(model, args), left(model)
        for extractor in extractors:
            assert_exact(extractor(*copied(args))[1], truth)
            assert_same(left(model), before)
        plain = copy.deepcopy(model)
        expected = torch.cat(one_by_one(model, args)) if apart else plain(*copied(args))
        with fastgrad.record(model):
            output = model(*args)
            found = fastgrad.grad_sqnorm(squares(output), list(model.parameters()))
        assert_exact(torch.stack(found, 1), truth)
        assert_same(output, expected)
        assert_same(left(model), left(plain))


def copied(args: Sequence[Any]) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, tuple(args))


def routes(model: nn.Module, *args: Any) -> dict[str, str]:
    """How `GradientFeatures` computes each parameter's norms."""
    extractor = fastgrad.GradientFeatures(model)
    extractor(*args)
    return {route.parameter: route.route for route in extractor.report()}
