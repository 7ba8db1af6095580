"""What a model's modules hold beside parameters: kept before a run, compared with what it left, and put back."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad._torch import pytree

#: Entries of a module's ``__dict__`` that are looked at by their own entries.
_TABLES = ("_buffers",)
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
    """Attributes and buffers of a model's modules, and the state of the random numbers, as they are now.

    Attributes of ``objects``, such as caches among a call's inputs, count like those of modules.

    Buffers that a run may write to in place are ``written``: their values are kept as well. None keeps all.
    """

    def __init__(
        self, model: nn.Module, written: frozenset[Buffer] | None = None, objects: Iterable[object] = ()
    ) -> None:
        self._modules = list(model.named_modules())
        holders = [module for _, module in self._modules] + list(objects)
        self._held: list[tuple[Any, dict[str, Any]]] = [
            (holder, {k: copied(v) for k, v in vars(holder).items() if k not in _FIXED}) for holder in holders
        ]
        self._versions = {
            (path, name): (
                buffer,
                buffer._version,
                buffer.detach().clone() if written is None or (path, name) in written else None,
            )
            for path, module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference()
        }
        self._random = Random(model)
        values = (value for _, held in self._held for value in held.values())
        #: Whether attributes hold tensors of an earlier call's graph, through which parameters may be used.
        self.holds_graphs = any(map(_graphed, values))

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
        kept = [(modules[path]._buffers, name, b, v) for (path, name), (b, _, v) in self._versions.items()]
        for buffers, name, _, value in kept:
            if value is not None:
                buffers[name] = value.clone()
        try:
            yield
        finally:
            for buffers, name, buffer, value in kept:
                if value is not None:
                    buffers[name] = buffer

    def changes(self) -> dict[Place, Any]:
        """Return the attributes that differ, with their present values; `ABSENT` for those that are gone."""
        found: dict[Place, Any] = {}
        for at, (module, held) in enumerate(self._held):
            now = vars(module)
            for name in {**held, **now}:
                if name in _FIXED or same(held.get(name, ABSENT), now.get(name, ABSENT)):
                    continue
                if name in _TABLES and isinstance(module, nn.Module):
                    before, after = held[name], now[name]
                    for key in {**before, **after}:
                        if before.get(key, ABSENT) is not after.get(key, ABSENT):
                            found[at, name, key] = after.get(key, ABSENT)
                else:
                    found[at, name, ""] = now.get(name, ABSENT)
        return found

    def name(self, place: Place) -> str:
        """Return the dotted name of an attribute."""
        at, table, key = place
        path = self._modules[at][0] if at < len(self._modules) else type(self._held[at][0]).__name__
        return ".".join(filter(None, (path, key or table)))

    def before(self, place: Place) -> Any:
        """Return what an attribute was, a copy if it was a list, dict or set."""
        at, table, key = place
        held = self._held[at][1].get(table, ABSENT)
        return copied(held.get(key, ABSENT) if key and held is not ABSENT else held)

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
        if type(now) is type(value) and type(now) in (list, dict, set):
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
            if value is not None and buffer._version != version:
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
    """The state of the random numbers of PyTorch, on the CPU and where a model lies, of Python and of NumPy."""

    def __init__(self, model: nn.Module) -> None:
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
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
