"""Snapshots of attributes, buffers and random states of a model: taken before a run, compared with, restored."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad.engine.layout import is_object
from fastgrad.evaluation import RandomState, evaluation_copy

_MUTABLE = (list, dict, set, deque)
#: Entries of a module's ``__dict__`` that only a first forward pass writes, if it adds hooks or layers.
_TABLES = frozenset(
    {
        "_parameters", "_modules", "_backward_pre_hooks", "_backward_hooks", "_forward_hooks",
        "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    }
)  # fmt: skip
_FIXED = frozenset(
    {
        "training", "forward", "_non_persistent_buffers_set", "_is_full_backward_hook", "_state_dict_hooks",
        "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip

#: A module's number, the entry of its ``__dict__``, and the key in it if that is looked into.
Place = tuple[int, str, str]
#: A module's path and the buffer's name.
Buffer = tuple[str, str]


def copy_containers(value: Any) -> Any:
    """Return a copy of lists, dicts, sets and deques, also inside each other; anything else as it is."""
    kind = type(value)
    if kind is list:
        return [copy_containers(item) for item in value]
    if kind is dict:
        return {key: copy_containers(item) for key, item in value.items()}
    if not isinstance(value, _MUTABLE):
        return value
    made: Any = copy.copy(value)
    if isinstance(value, dict):
        for key, item in value.items():
            made[key] = copy_containers(item)
    return made


def holds_same(value: Any, other: Any) -> bool:
    """Whether two values hold the same objects."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, (list, deque)):
        return len(value) == len(other) and all(map(holds_same, value, other))
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(holds_same(item, other[key]) for key, item in value.items())
    return isinstance(value, set) and value == other


class State:
    """A snapshot of what a model's modules hold, and of the states of random generators.

    ``modules`` come with their paths. Attributes of ``objects``, such as caches among a call's inputs, count like those
    of modules. Values of buffers in ``written``, or of all for None, are kept as well: runs may write in place.
    ``tables`` are those of parameters, layers and hooks.
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, nn.Module]],
        written: frozenset[Buffer] | None = None,
        objects: Iterable[object] = (),
        *,
        tables: bool = False,
    ) -> None:
        self._modules = modules
        self._skipped = _FIXED if tables else _FIXED | _TABLES
        #: Each holder, its attributes, and copies of the containers among them.
        self._held: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        #: Whether attributes hold tensors of an earlier call's graph, through which parameters may be used.
        self.holds_graphs = False
        for holder in (*(module for _, module in modules), *objects):
            now = vars(holder)
            held, inner = {name: now[name] for name in now.keys() - self._skipped}, {}
            for name, value in held.items():
                if isinstance(value, _MUTABLE):
                    inner[name] = copy_containers(value)
                    self.holds_graphs = self.holds_graphs or _graphed(value)
                elif isinstance(value, Tensor):
                    self.holds_graphs = self.holds_graphs or value.grad_fn is not None
            self._held.append((holder, held, inner))
        tensors = (
            (table, name, path, value)
            for path, module in modules
            for table in (module._buffers, vars(module))
            for name, value in table.items()
            if (written is None or (path, name) in written) and isinstance(value, Tensor) and not value.is_inference()
        )
        #: For each buffer or tensor in an attribute: the table that holds it, the tensor, its version and its value.
        self._versions = {
            (path, name): (table, value, value._version, value.detach().clone())
            for table, name, path, value in (tensors if written is None or written else ())
        }
        #: Copies that replace buffers for a while, and by buffer the latest that was written to.
        self._own: dict[int, Tensor] = {}
        self._written: dict[Buffer, Tensor] = {}
        self._random = RandomState(module for _, module in modules)
        #: Attributes that runs have changed.
        self.changed: set[Place] = set()

    def written(self) -> frozenset[Buffer]:
        """Return the buffers that were written to since, or copies of them."""
        found = {place for place, (_, held, before, _) in self._versions.items() if held._version != before}
        return frozenset(found | self._written.keys())

    def drew(self) -> bool:
        """Whether random numbers were drawn since."""
        return not self._random.same()

    def agrees(self, other: State) -> bool:
        """Whether buffers and random numbers are, after a run since ``other``, as when this snapshot was taken."""
        now = {place: held for place, (_, held, _, _) in other._versions.items()} | other._written
        same = (torch.equal(now[place], value) for place, (_, _, _, value) in self._versions.items())
        return self._random.same() and all(same)

    @contextlib.contextmanager
    def own_buffers(self) -> Iterator[None]:
        """Replace the kept buffers by copies inside, so that no graph holds the originals."""
        kept = [(table, place, held, value.clone()) for place, (table, held, _, value) in self._versions.items()]
        self._own.update({id(own): own for _, _, _, own in kept})
        for table, (_, name), _, own in kept:
            table[name] = own
        try:
            yield
        finally:
            self._written.update({place: own for _, place, _, own in kept if own._version})
            for table, (_, name), held, _ in kept:
                table[name] = held

    def changes(self) -> dict[Place, Any]:
        """Return the attributes that differ, with their present values, `ABSENT` if deleted."""
        found: dict[Place, Any] = {}
        for at, (holder, held, inner) in enumerate(self._held):
            now = vars(holder)
            names = now.keys() - self._skipped
            for name in names:
                value = now[name]
                if id(value) in self._own:
                    continue
                if held.get(name, ABSENT) is value and (name not in inner or holds_same(inner[name], value)):
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

    def objects(self) -> list[Any]:
        """Return the objects with attributes of their own that modules hold, also in lists."""
        values = (value for _, held, _ in self._held for value in held.values())
        found = (item for value in values for item in (value if type(value) is list else (value,)) if is_object(item))
        return list({id(item): item for item in found}.values())

    def name(self, place: Place) -> str:
        """Return the dotted name of an attribute."""
        at, table, key = place
        path = self._modules[at][0] if at < len(self._modules) else type(self._held[at][0]).__name__
        return ".".join(filter(None, (path, key or table)))

    def before(self, place: Place) -> Any:
        """Return the earlier value of an attribute; a copy of a list, dict or set."""
        at, table, key = place
        _, held, inner = self._held[at]
        value = inner.get(table, held.get(table, ABSENT))
        return copy_containers(value.get(key, ABSENT) if key else value)

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
        if type(now) is not type(value) or not isinstance(now, _MUTABLE):
            entries[name] = value
        elif isinstance(now, list):
            now[:] = value
        else:
            now.clear()
            (now.extend if isinstance(now, deque) else now.update)(value)

    def restore(self, *, numbers: bool = True) -> None:
        """Restore everything."""
        for place in self.changes():
            self.write(place, self.before(place))
        for _, held, version, value in self._versions.values():
            if held._version != version:
                with torch.no_grad():
                    held.copy_(value)
        if numbers:
            self._random.restore()


def _graphed(value: Any) -> bool:
    """Whether a value, or what a list or dict holds, is a tensor with a graph."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    if type(value) is dict:
        return any(map(_graphed, value.values()))
    return type(value) is list and any(map(_graphed, value))


ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()


def detach_plain(x: Tensor) -> Tensor:
    """Return ``x`` detached, and copied if it was made in inference mode, so that a graph can use it."""
    return x.clone().detach() if x.is_inference() else x.detach()


def evaluation_model(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is in evaluation mode and a graph can use its tensors, or else such a copy."""
    for module in model.modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if module.training or any(t is not None and t.is_inference() for t in tensors):
            return evaluation_copy(model)
    return model
