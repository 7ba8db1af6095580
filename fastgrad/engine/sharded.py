"""Models whose parameters FSDP shards over processes (``fully_shard``).

FSDP puts whole parameters into a module when it is called, and takes them out again. Its hooks of modules do so; they
run on the batch here, one level below ``vmap``. A whole parameter is one object for the life of the model, whose memory
comes and goes, so that uses are known by it. Ranks have to gather as often as each other: what depends on the values of
one rank's samples is refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import (
    is_hook_of_shards,
    is_view,
    lowered,
    outside_of_compilation,
    pytree,
    shards_in,
    shards_of,
    without_modes,
)  # fmt: skip
from fastgrad.engine.outputs import flatten
from fastgrad.engine.turns import reading
from fastgrad.layers.call import Call, NotPerSampleError

Know = Callable[[Iterable[Any]], None]
Modules = Iterable[tuple[str, nn.Module]]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shards parameters of a model."""
    return bool(shards_in(model))


def whole_parameters(model: nn.Module) -> dict[int, Tensor]:
    """Return whole parameters by the ids of their parts; those that were never gathered are left out."""
    return {id(part): whole for parts, whole, _ in shards_in(model) if whole is not None for part in parts}


def whole(model: nn.Module, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return parameters of a model, each as the one object that its uses are known by."""
    wholes = whole_parameters(model)
    return [wholes.get(id(p), p) for p in parameters]


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the same for all parameters, by name."""
    wholes, named = whole_parameters(model), outside_of_compilation(_named)(model)
    return {name: wholes.get(id(p), p) for name, p in named.items()}


def _named(model: nn.Module) -> dict[str, Tensor]:
    with reading():
        return dict(model.named_parameters())


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the names of parameters and of their parts, by id."""
    found = {id(p): name for name, p in named_parameters(model).items()}
    return found | {part: found[id(own)] for part, own in whole_parameters(model).items() if id(own) in found}


def refuse(reason: str) -> NotPerSampleError:
    """Return the error for a sharded model whose samples cannot run together, for this ``reason``."""
    return NotPerSampleError(
        "model must run on all samples together where fully_shard shards it, because every rank has to gather its "
        f"parameters equally often; {reason}"
    )


@contextlib.contextmanager
def _hooks(modules: Modules, before: Callable[[Any], Any], after: Callable[[Any], Any]) -> Iterator[None]:
    """Replace FSDP's hooks before and after a module by what these functions make of them, inside.

    The tables of hooks are those of all threads: several threads could not gather in one order on all ranks anyway.
    """
    kept = []
    for _, module in modules:
        if any(True for _ in shards_of(module)):
            first: tuple[Any, Any] = (module._forward_pre_hooks, before)
            tables = (first, (module._forward_hooks, after))
            kept += [(t, key, hook, make) for t, make in tables for key, hook in t.items() if is_hook_of_shards(hook)]
    try:
        for table, key, hook, make in kept:
            table[key] = make(hook)
        yield
    finally:
        for table, key, hook, _ in kept:
            table[key] = hook


def hooks_without_graph(modules: Modules) -> contextlib.AbstractContextManager[None]:
    """Have FSDP's hooks gather parameters inside for a call that has no backward pass."""
    return _hooks(modules, torch.no_grad(), torch.no_grad())


def hooks_below(modules: Modules, call: Call, know: Know) -> contextlib.AbstractContextManager[None]:
    """Run FSDP's hooks on the batch of ``call`` inside; ``know`` is told of tensors that they make."""
    return _hooks(
        modules, lambda hook: functools.partial(_before, hook, call, know),
        lambda hook: functools.partial(_after, hook, call, know),
    )  # fmt: skip


def _before(hook: Any, call: Call, know: Know, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a hook before the forward pass of a module, which gathers its parameters and may cast the inputs."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    made = _on_batch(lambda own: hook(module, *pytree.tree_unflatten(own, spec)), leaves, call, know)
    assert isinstance(call.parameters, dict)
    call.parameters.update({id(own): own for _, own, _ in shards_of(module) if own is not None})
    return made


def _after(hook: Any, call: Call, know: Know, module: nn.Module, args: Any, output: Any) -> Any:
    """Run a hook after the forward pass of a module, which watches its outputs for the backward pass."""
    leaves, rebuilt, _ = flatten(output)
    # FSDP loses a hook of a view that the model then writes to.
    leaves = [call.wrapped(_no_view(call.physical(x))) if call.is_batched(x) else x for x in leaves]
    return _on_batch(lambda own: hook(module, args, rebuilt(own)), leaves, call, know)


def _on_batch(function: Callable[[list[Any]], Any], leaves: list[Any], call: Call, know: Know) -> Any:
    """Return what ``function`` makes of ``leaves``, a tree of as many; tensors of samples are batches in it."""
    call.require_level()
    batches = [call.physical(x) for x in leaves]
    with without_modes(), lowered():
        values, rebuilt, _ = flatten(function(batches))
    each = zip(values, batches, leaves, strict=True)
    made = [old if new is batch else call.wrapped(new) if call.is_batched(old) else new for new, batch, old in each]
    know(made)
    return rebuilt(made)


def _no_view(batch: Tensor) -> Tensor:
    return batch.clone() if batch.requires_grad and is_view(batch) else batch
