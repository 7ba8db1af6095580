"""What a model's modules hold beside parameters: kept before a run, compared with what it left, and put back."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad._torch import pytree

_MUTABLE = (list, dict, set)
#: Entries that no forward pass writes.
_FIXED = frozenset(
    {
        "_parameters", "_modules", "training", "forward", "_non_persistent_buffers_set", "_backward_pre_hooks",
        "_backward_hooks", "_is_full_backward_hook", "_forward_hooks", "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks",
        "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip

#: A module's number, the entry of its ``__dict__``, and the key in it if that is looked into.
Place = tuple[int, str, str]
#: A module's path and the buffer's name.
Buffer = tuple[str, str]


def copied(value: Any) -> Any:
    """Return a copy of lists, dicts and sets, also inside each other; anything else as it is."""
    kind = type(value)
    if kind is list:
        return [copied(item) for item in value]
    if kind is dict:
        return {key: copied(item) for key, item in value.items()}
    if kind is set:
        return set(value)
    return value


def same(value: Any, other: Any) -> bool:
    """Whether two values hold the same objects."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if type(value) is list:
        return len(value) == len(other) and all(map(same, value, other))
    if type(value) is dict:
        return value.keys() == other.keys() and all(same(item, other[key]) for key, item in value.items())
    return type(value) is set and value == other


class State:
    """What a model's modules hold, and the state of the random numbers, as they are now.

    ``modules`` come with their paths. Attributes of ``objects``, such as caches among a call's inputs, count like those
    of modules. Buffers that a run may write to in place are ``written``, None for all: their values are kept as well.
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, nn.Module]],
        written: frozenset[Buffer] | None = None,
        objects: Iterable[object] = (),
    ) -> None:
        self._modules = modules
        #: Each holder of attributes, these, and copies of those that may be written to.
        self._held: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        #: Whether attributes hold tensors of an earlier call's graph, through which parameters may be used.
        self.holds_graphs = False
        for holder in (*(module for _, module in modules), *objects):
            now = vars(holder)
            held, inner = {name: now[name] for name in now.keys() - _FIXED}, {}
            for name, value in held.items():
                if type(value) in _MUTABLE:
                    inner[name] = copied(value)
                    self.holds_graphs = self.holds_graphs or _graphed(value)
                elif isinstance(value, Tensor):
                    self.holds_graphs = self.holds_graphs or value.grad_fn is not None
            self._held.append((holder, held, inner))
        self._versions = {
            (path, name): (buffer, buffer._version, buffer.detach().clone())
            for path, module in modules
            for name, buffer in module._buffers.items()
            if (written is None or (path, name) in written) and buffer is not None and not buffer.is_inference()
        }
        #: Copies that take the place of buffers for a while.
        self._own: dict[int, Tensor] = {}
        parameters = (p for _, module in modules for p in module._parameters.values())
        self._random = Random({p.device for p in parameters if p is not None and p.is_cuda})

    def written(self) -> frozenset[Buffer]:
        """Return the buffers that were written to since."""
        return frozenset(place for place, (buffer, version, _) in self._versions.items() if buffer._version != version)

    def drew(self) -> bool:
        """Whether random numbers were drawn since."""
        return self._random.drew()

    @contextlib.contextmanager
    def own_buffers(self) -> Iterator[None]:
        """Have the model write to copies of the buffers that are kept, so that no graph holds the originals."""
        modules = dict(self._modules)
        kept = [(modules[path]._buffers, name, b, v.clone()) for (path, name), (b, _, v) in self._versions.items()]
        self._own.update({id(own): own for _, _, _, own in kept})
        for buffers, name, _, own in kept:
            buffers[name] = own
        try:
            yield
        finally:
            for buffers, name, buffer, _ in kept:
                buffers[name] = buffer

    def changes(self) -> dict[Place, Any]:
        """Return the attributes that differ, with their present values; `ABSENT` for those that are gone."""
        found: dict[Place, Any] = {}
        for at, (holder, held, inner) in enumerate(self._held):
            now = vars(holder)
            names = now.keys() - _FIXED
            for name in names:
                value = now[name]
                if held.get(name, ABSENT) is value and (name not in inner or same(inner[name], value)):
                    continue
                if name == "_buffers" and isinstance(holder, nn.Module):
                    before = inner[name]
                    for key in {**before, **value}:
                        after = value.get(key, ABSENT)
                        if before.get(key, ABSENT) is not after and id(after) not in self._own:
                            found[at, name, key] = after
                else:
                    found[at, name, ""] = value
            if held.keys() != names:
                found.update({(at, name, ""): ABSENT for name in held.keys() - names})
        return found

    def name(self, place: Place) -> str:
        """Return the dotted name of an attribute."""
        at, table, key = place
        path = self._modules[at][0] if at < len(self._modules) else type(self._held[at][0]).__name__
        return ".".join(filter(None, (path, key or table)))

    def before(self, place: Place) -> Any:
        """Return what an attribute was, a copy if it was a list, dict or set."""
        at, table, key = place
        _, held, inner = self._held[at]
        value = inner.get(table, held.get(table, ABSENT))
        return copied(value.get(key, ABSENT) if key else value)

    def write(self, place: Place, value: Any) -> None:
        """Write an attribute: lists, dicts and sets keep their identity."""
        at, table, key = place
        module = self._held[at][0]
        entries = vars(module)[table] if key else vars(module)
        name = key or table
        if value is ABSENT:
            entries.pop(name, None)
            return
        now = entries.get(name, ABSENT)
        if type(now) is type(value) and type(now) in _MUTABLE:
            if type(now) is list:
                now[:] = value
            else:
                now.clear()
                now.update(value)
        else:
            entries[name] = value

    def restore(self, *, numbers: bool = True) -> None:
        """Put everything back as it was."""
        for place in self.changes():
            self.write(place, self.before(place))
        for buffer, version, value in self._versions.values():
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
        if numbers:
            self._random.restore()


def _graphed(value: Any) -> bool:
    """Whether a value, or what a list or dict holds, is a tensor with a graph."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    if type(value) is dict:
        return any(map(_graphed, value.values()))
    return type(value) is list and any(map(_graphed, value))


class Random:
    """The state of the random numbers of PyTorch, on the CPU and some ``devices``, of Python and of NumPy."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._states = {device: torch.cuda.get_rng_state(device) for device in devices}
        self._cpu = torch.get_rng_state()
        self._python, self._numpy = random.getstate(), np.random.get_state(legacy=False)

    def drew(self) -> bool:
        """Whether random numbers were drawn since."""
        if not torch.equal(self._cpu, torch.get_rng_state()) or self._python != random.getstate():
            return True
        before, now = (s["state"] for s in (self._numpy, np.random.get_state(legacy=False)))
        if before["pos"] != now["pos"] or not np.array_equal(before["key"], now["key"]):
            return True
        return any(not torch.equal(state, torch.cuda.get_rng_state(d)) for d, state in self._states.items())

    def restore(self) -> None:
        """Have the same numbers drawn again."""
        torch.set_rng_state(self._cpu)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        for device, state in self._states.items():
            torch.cuda.set_rng_state(state, device)


ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()


def detach_plain(x: Tensor) -> Tensor:
    """Return ``x`` detached, and copied if it was made in inference mode, so that a graph can use it."""
    return x.clone().detach() if x.is_inference() else x.detach()


def evaluated(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is in evaluation mode, or else a copy that is, and that shares all tensors.

    Tensors that were made in inference mode, which no graph can use, are copied as well.

    ValueError if it must be copied and cannot be.
    """
    inside = [t for t in (*model.parameters(), *model.buffers()) if t.is_inference()]
    if not inside and not any(module.training for module in model.modules()):
        return model
    shared = [t for module in model.modules() for value in vars(module).values() for t in pytree.tree_leaves(value)]
    tensors = [*model.parameters(), *model.buffers(), *(t for t in shared if isinstance(t, Tensor))]
    try:
        return copy.deepcopy(model, {id(t): t for t in tensors if not t.is_inference()}).eval()
    except Exception as error:
        raise ValueError(
            f"model must be in evaluation mode, or be one that copy.deepcopy copies; it is in training mode, and "
            f"copying it failed: {error}"
        ) from error
