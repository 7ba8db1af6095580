"""Peers that give gradients of layers rather than of parameters, and leave some out: dattri-llm and bergson.

A loss is a function without arguments that runs the model. Both hook the modules of the model that they are given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.micro.tasks import Task, norm_error


class OfLayers(NamedTuple):
    """Squared norms ``(B, L)`` by layer, or inner products ``(B, B)`` over all of these layers together."""

    layers: list[str]
    value: Tensor


Result = Callable[[], OfLayers]


def dattri_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Any]:
    """Return the call that captures factors of the gradient of every layer that dattri-llm knows."""
    from dattri_llm import REGISTER_ALL, CaptureCallback, HookManager, HookManagerConfig

    capture = CaptureCallback()
    manager = HookManager(model, config=HookManagerConfig(linear_io=REGISTER_ALL), callbacks=[capture])

    def call() -> Any:
        model.zero_grad(set_to_none=True)
        capture.record = None
        with manager.collect():
            loss().backward()
        if capture.record is None:
            raise RuntimeError("no gradients were captured")
        return capture.record.gradient

    return call


def bergson_gradients(
    model: nn.Module, loss: Callable[[], Tensor], layers: set[str] | None = None
) -> Callable[[], dict[str, Tensor]]:
    """Return the call that gives gradients ``(B, ...)`` of linear layers, biases too, without projection."""
    from bergson.collector.gradient_collectors import TraceCollector
    from bergson.gradients import GradientProcessor

    processor = GradientProcessor(include_bias=True)
    how = {"device": torch.device("cpu"), "dtype": next(model.parameters()).dtype, "target_modules": layers}

    def call() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        collector = TraceCollector(model=model, processor=processor, **how)
        with collector.with_batch(None):
            loss().backward()
        return {
            name: uses[0] if len(uses) == 1 else torch.stack(uses).sum(0)
            for name, uses in collector.mod_grads.items()
        }  # fmt: skip

    return call


def owned(model: nn.Module, modules: Iterable[str]) -> set[str]:
    """Return the names of the parameters that these modules own; a shared one has the name that PyTorch gives."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for each in modules for p in model.get_submodule(each).parameters(recurse=False)}


def base(layer: str) -> str:
    """Return a layer's module, whose uses dattri-llm numbers."""
    return layer.split("@")[0]


def _dattri(task: Task) -> Callable[[], Any]:
    model = copy.deepcopy(task.model)
    return dattri_gradients(model, lambda: task.loss(model(task.x)))


def dattri_norms(task: Task) -> Result:
    gradient = _dattri(task)

    def call() -> OfLayers:
        from dattri_llm.gradient import grad_norm_sq

        one = gradient()
        found = [grad_norm_sq(data, one.layer_types[name]) for name, data in one.data.items()]
        # A table of positions that all samples share has one row.
        return OfLayers([base(name) for name in one.data], torch.stack([n.expand(len(task.x)) for n in found], 1))

    return call


def dattri_gram(task: Task) -> Result:
    gradient = _dattri(task)

    def call() -> OfLayers:
        one = gradient()
        return OfLayers([base(name) for name in one.layer_names], one.similarity(one, reduce="all"))

    return call


def _bergson(task: Task) -> Callable[[], dict[str, Tensor]]:
    """Take the linear layers with inputs ``(B, T, D)``; bergson refuses others."""
    model, found = copy.deepcopy(task.model), set()

    def see(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].dim() == 3:
            found.add(name)

    hooks = [
        module.register_forward_pre_hook(partial(see, name))
        for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]  # fmt: skip
    task.loss(model(task.x))  # with a graph: some modules skip their parts' hooks without one
    for hook in hooks:
        hook.remove()
    if not found:
        raise TypeError("bergson takes linear layers with inputs (B, T, D); the network has none")
    return bergson_gradients(model, lambda: task.loss(model(task.x)), found)


def bergson_norms(task: Task) -> Result:
    gradients = _bergson(task)

    def call() -> OfLayers:
        found = gradients()
        return OfLayers(list(found), torch.stack([g.flatten(1).square().sum(1) for g in found.values()], 1))

    return call


def bergson_gram(task: Task) -> Result:
    gradients = _bergson(task)

    def call() -> OfLayers:
        found = gradients()
        products = [(flat := g.flatten(1)) @ flat.mT for g in found.values()]
        return OfLayers(list(found), torch.stack(products).sum(0))

    return call


def norm_errors(task: Task, result: OfLayers) -> float:
    """Return the largest error of the norms of layers on the first and the last sample, as `Task.error`."""
    order = {name: n for n, name in enumerate(dict(task.model.named_parameters()))}
    own = [[order[name] for name in owned(task.model, [layer])] for layer in result.layers]
    pairs = zip(result.value[[0, -1]], task.wanted, strict=True)
    return max(norm_error(found, torch.stack([exact[places].sum() for places in own])) for found, exact in pairs)


def covered(task: Task, result: OfLayers) -> float:
    """Return the share of the numbers of the network's parameters."""
    numbers = {name: p.numel() for name, p in task.model.named_parameters()}
    return sum(numbers[name] for name in owned(task.model, result.layers)) / sum(numbers.values())
