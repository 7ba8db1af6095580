"""Every tool as its documentation says: norms of each parameter's gradients, and inner products of whole gradients.

A tool is a function of a task that prepares the model and returns calls. ``norms()`` gives squared norms ``(B,)`` by
parameter; a tool that gives none by parameter gives those of all that it covers, named ``""``. ``gram()`` gives
``(B, B)``. `Calls.covered` are the names of the parameters that the tool gives gradients of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

import fastgrad
from bench.conformance.task import Task, rows_of
from bench.micro.layer_peers import base, bergson_gradients, dattri_gradients, owned
from bench.micro.network_peers import batching, state

#: Length of `grad_project`'s rows.
SIZE = 512
Norms = Mapping[str, Tensor]


class Calls(NamedTuple):
    """What a tool computes."""

    norms: Callable[[], Norms]
    gram: Callable[[], Tensor]
    covered: Callable[[], set[str]]
    rows: Callable[[], Tensor] | None = None


def ours(task: Task) -> Calls:
    named = task.parameters

    def norms() -> Norms:
        with fastgrad.record(task.model):
            found = fastgrad.grad_sqnorm(task.losses(), list(named.values()))
        return dict(zip(named, found, strict=True))

    def gram() -> Tensor:
        with fastgrad.record(task.model):
            return fastgrad.grad_gram(task.losses(), list(named.values()))

    return Calls(norms, gram, lambda: set(named), lambda: rows_of(task, SIZE))


def squares(gradients: Mapping[str, Tensor]) -> Norms:
    return {name: g.flatten(1).square().sum(1) for name, g in gradients.items()}


def products(gradients: Iterable[Tensor]) -> Tensor:
    return torch.stack([g.flatten(1) @ g.flatten(1).mT for g in gradients]).sum(0)


def vmapped(task: Task) -> Calls:
    """PyTorch's tutorial on per-sample gradients."""
    parameters, buffers = state(task.model)

    def loss(parameters: dict[str, Tensor], x: Any) -> Tensor:
        one = {key: value[None] for key, value in x.items()} if isinstance(x, Mapping) else x[None]
        return task.call(lambda *args, **named: functional_call(task.model, (parameters, buffers), args, named), one)[0]

    gradients = batching(lambda: vmap(grad(loss), (None, 0), randomness="different")(parameters, task.x))
    return Calls(lambda: squares(gradients()), lambda: products(gradients().values()), lambda: set(parameters))


def opacus(task: Task) -> Calls:
    """Opacus' hooks, which work in training mode; dropout is off."""
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(copy.deepcopy(task.model).train(), loss_reduction="sum")
    parameters = dict(model._module.named_parameters())

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        for p in parameters.values():
            p.grad_sample = None
        task.losses(model).sum().backward()
        found = {name: p.grad_sample for name, p in parameters.items() if p.grad_sample is not None}
        for name, each in found.items():
            if len(each) != task.batch:
                raise ValueError(f"grad_sample of {name} has {len(each)} rows for {task.batch} samples")
        return found

    return Calls(
        lambda: squares(gradients()), lambda: products(gradients().values()), lambda: set(gradients())
    )  # fmt: skip


def backpack(task: Task) -> Calls:
    """BackPACK's squared norms, and its gradients of each sample for inner products."""
    from backpack import backpack, extend, extensions

    model = extend(copy.deepcopy(task.model))
    parameters = dict(model.named_parameters())

    def quantity(extension: Any, name: str) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        for p in parameters.values():
            vars(p).pop(name, None)
        with backpack(extension):
            task.losses(model).sum().backward()
        # Layers without the extension give their parameters nothing; no parameter at all is a refusal.
        found = {key: getattr(p, name) for key, p in parameters.items() if hasattr(p, name)}
        if not found:
            raise AttributeError(f"no parameter has the attribute {name!r}")
        return found

    def norms() -> Norms:
        return quantity(extensions.BatchL2Grad(), "batch_l2")

    def gram() -> Tensor:
        return products(quantity(extensions.BatchGrad(), "grad_batch").values())

    return Calls(norms, gram, lambda: set(norms()))


def dattri(task: Task) -> Calls:
    """Factorised gradients of every layer that dattri-llm knows, and its inner products over all of them."""
    model = copy.deepcopy(task.model)
    gradient = dattri_gradients(model, lambda: task.losses(model).sum())

    def gram() -> Tensor:
        one = gradient()
        found: Tensor = one.similarity(one, reduce="all")
        return found

    def covered() -> set[str]:
        return owned(model, map(base, gradient().layer_names))

    return Calls(lambda: {"": gram().diagonal()}, gram, covered)


def bergson(task: Task) -> Calls:
    """Gradients of linear layers by bergson's hooks, biases too, without projection."""
    model = copy.deepcopy(task.model)
    gradients = bergson_gradients(model, lambda: task.losses(model).sum())

    return Calls(
        lambda: {"": products(gradients().values()).diagonal()}, lambda: products(gradients().values()),
        lambda: owned(model, gradients()),
    )  # fmt: skip


TOOLS: dict[str, Callable[[Task], Calls]] = {
    "fastgrad": ours, "vmap(grad)": vmapped, "Opacus": opacus, "BackPACK": backpack, "dattri-llm": dattri,
    "bergson": bergson,
}  # fmt: skip
