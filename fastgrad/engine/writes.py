"""What a call writes to attributes, containers one level deep, buffers and inputs: noted, undone, or given rows."""

from __future__ import annotations

import contextlib
import inspect
import operator
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrad._torch import is_elsewhere, unwrapped
from fastgrad.engine.outputs import Place, split
from fastgrad.engine.turns import reading

_CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})
#: Tables of a module's parameters and layers, which are undone but hold no tensor of a sample.
_TABLES = frozenset({"_parameters", "_modules"})
#: What `fastgrad.engine.modules` replaces, for all threads.
_REDIRECTED = frozenset({"forward", "_compiled_call_impl"})
_ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "absent"})()
_OPERATORS = {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul", "lshift")
} | {"__irshift__", "__setitem__"}  # fmt: skip

_known: dict[Callable[..., Any], tuple[bool, int]] = {}
#: Types of attributes that hold nothing.
_PLAIN = frozenset({bool, int, float, str, type(None), tuple, type})
#: Functions named as if they wrote values.
_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_", "rename_", "resolve_conj_", "as_strided_"})

#: A holder's number, and the attribute's name.
Attribute = tuple[int, str]
#: The same, and the key in a list or dictionary, or None.
Entry = tuple[int, str, Any]


def _writing(function: Callable[..., Any]) -> tuple[bool, int]:
    """Return whether a function writes to its first argument, and the place of its argument ``inplace``, or -1."""
    # A table of its own: compilers that trace through modes warn of functools.
    found = _known.get(function)
    if found is None:
        found = _known[function] = _looked_up(function)
    return found


def _looked_up(function: Callable[..., Any]) -> tuple[bool, int]:
    name = getattr(function, "__name__", "")
    if name in _HARMLESS:
        return False, -1
    if (name.endswith("_") and not name.endswith("__")) or name in _OPERATORS:
        return True, -1
    if getattr(function, "__module__", "") != "torch.nn.functional":
        return False, -1
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:  # builtins, none of which has this argument
        return False, -1
    return False, names.index("inplace") if "inplace" in names else -1


class Snapshot:
    """What the modules of a model and objects among its inputs hold, and what the tensors held that were written to."""

    def __init__(
        self, modules: Sequence[tuple[str, nn.Module]], objects: Iterable[object], inputs: Sequence[Any],
        *, sharded: bool = False,
    ) -> None:  # fmt: skip
        self._paths, self._inputs = modules, inputs
        #: Each holder, its attributes, and copies of the containers among them; an empty one's copy is itself.
        self._held: list[tuple[Any, dict[str, Any], list[tuple[str, Any, Any]]]] = []
        #: Tensors in attributes that are no buffers, and in their lists and dictionaries.
        self.tensors: list[tuple[Entry, Tensor]] = []
        for holder in (*(module for _, module in modules), *objects):
            held, inner = vars(holder).copy(), []
            for name, value in held.items():
                kind = type(value)
                if kind in _PLAIN or (sharded and name == "_parameters"):
                    continue  # parameters of a sharded model come and go
                if kind in _CONTAINERS:
                    inner.append((name, value, value.copy() if value else None))
                    if value and name not in _TABLES and name != "_buffers":
                        self.tensors += entries((len(self._held), name), value, Tensor)
                elif isinstance(value, Tensor):
                    if is_elsewhere(value):  # a call in another thread writes here: its samples' tensors die with it
                        held[name] = None
                    else:
                        self.tensors.append(((len(self._held), name, None), value))
            self._held.append((holder, held, inner))
        #: By id, the tensors that were written to in place, and their values before.
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._persistent: dict[bool, dict[int, list[Tensor]]] = {}

    def holders(self) -> Iterator[Any]:
        """Yield what holds attributes."""
        return (holder for holder, _, _ in self._held)

    def name(self, place: Attribute | Entry) -> str:
        """Return the dotted name of an attribute."""
        at, name = place[:2]
        path = self._paths[at][0] if at < len(self._paths) else type(self._held[at][0]).__name__
        return ".".join(filter(None, (path, name)))

    # Tensors that are written to in place.

    def watch(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Keep the value of a tensor that outlives the call, if the function is about to write to it."""
        writes, at = _writing(function)
        if at >= 0:
            writes = bool(kwargs.get("inplace") or (len(args) > at and args[at]))
        targets = [args[0]] if writes and args else []
        if function is F.instance_norm:  # in training mode, to running statistics
            targets = [*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
        out = kwargs.get("out")
        targets += list(out) if isinstance(out, (tuple, list)) else [] if out is None else [out]
        for target in targets:
            memory = _memory_of(target)
            # Of what outlives a call, inputs and states alone are given to the samples by rows.
            rows = bool(memory) and unwrapped(target) is not target
            for tensor in self._of_memory(memory, rows=rows) if memory else ():
                if id(tensor) not in self._before:
                    self._before[id(tensor)] = tensor, tensor.detach().clone()

    def _of_memory(self, memory: int, *, rows: bool) -> list[Tensor]:
        """Return the tensors that have this memory, of those that are given by rows or of all that outlive the call."""
        found = self._persistent.get(rows)
        if found is None:
            found = self._persistent[rows] = {}
            given = [*self._inputs, *(t for _, t in self.tensors)]
            for _, _, inner in self._held if not rows else ():
                for name, _, content in inner:
                    given += [t for _, t in entries((0, name), content, Tensor)]
            for value in given:
                where = _memory_of(value)
                if where:
                    found.setdefault(where, []).append(value)
        return found.get(memory, [])

    def written(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return tensors that were written to in place, by id, with copies of their present values."""
        return {
            key: (tensor, tensor.detach().clone())
            for key, (tensor, before) in self._before.items()
            if not torch.equal(tensor, before)
        }

    # Attributes.

    def changes(self) -> dict[Attribute, Any]:
        """Return the attributes that differ, with their values; of a container that was changed, a copy."""
        found: dict[Attribute, Any] = {}
        with reading():
            for at, (holder, held, inner) in enumerate(self._held):
                now = vars(holder).copy()  # at once: other threads' calls come and go here
                for name, value in now.items():
                    if held.get(name, _ABSENT) is not value and name not in _REDIRECTED:
                        found[at, name] = value
                found |= {(at, name): _ABSENT for name in held.keys() - now.keys() - _REDIRECTED}
                for name, container, content in inner:
                    if now.get(name) is container and not _alike(container, content):
                        found[at, name] = container.copy()
        return found

    def write(self, place: Attribute, value: Any) -> None:
        """Write an attribute; a container keeps its identity."""
        at, name = place
        holder, held, _ = self._held[at]
        with reading():
            if value is _ABSENT:
                vars(holder).pop(name, None)
            elif type(value) in _CONTAINERS and type(held.get(name)) is type(value):
                _fill(held[name], value)
                vars(holder)[name] = held[name]
            else:
                vars(holder)[name] = value

    def earlier(self, entry: Entry) -> Any:
        """Return what an attribute held, or an entry of one; None if there was nothing."""
        at, name, key = entry
        _, held, inner = self._held[at]
        value = next((content for own, _, content in inner if own == name), held.get(name))
        return (
            value if key is None else next((v for own, v in entries((at, name), value, object) if own == entry), None)
        )

    def holder(self, at: int) -> Any:
        """Return the holder of this number."""
        return self._held[at][0]

    def attributes(self) -> Iterator[tuple[Attribute, Any]]:
        """Yield every attribute that may hold tensors, with its present value."""
        with reading():
            present = [vars(holder).copy() for holder, _, _ in self._held]
        for at, held in enumerate(present):
            for name, value in held.items():
                if name not in _TABLES and (isinstance(value, Tensor) or (type(value) in _CONTAINERS and value)):
                    yield (at, name), value

    def restore(self) -> None:
        """Undo everything."""
        with reading():
            self._restore()
        self._before.clear()

    def _restore(self) -> None:
        for holder, held, inner in self._held:
            now = vars(holder)
            if len(now) != len(held) or not all(map(operator.is_, now.values(), held.values())):
                for name in now.keys() - held.keys() - _REDIRECTED:
                    now.pop(name, None)
                for name, value in held.items():
                    if name not in _REDIRECTED and now.get(name, _ABSENT) is not value:
                        now[name] = value
            for _, container, content in inner:
                if (container or content) and not _alike(container, content):
                    _fill(container, content or ())
        with torch.no_grad():
            for tensor, value in self._before.values():
                if not torch.equal(tensor, value):  # a graph may hold what was written in vain
                    tensor.copy_(value)


def made_layers(changes: Iterable[Attribute]) -> bool:
    """Whether a call made parameters or layers."""
    return any(name in _TABLES for _, name in changes)


def _alike(container: Any, content: Any) -> bool:
    """Whether a container holds the same objects as its copy, or nothing for None."""
    if content is None or len(container) != len(content):
        return not container and not content
    if isinstance(container, set):
        return bool(container == content)
    values = (container, content) if not isinstance(container, dict) else (container.values(), content.values())
    return all(map(operator.is_, *values)) and (
        not isinstance(container, dict) or all(map(operator.is_, container, content))
    )


def _fill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
        return
    container.clear()
    (container.extend if isinstance(container, deque) else container.update)(content)


def _memory_of(value: Any) -> int:
    """Return the address of a tensor's memory; 0 if it has none of its own."""
    if not isinstance(value, Tensor):
        return 0
    whole = unwrapped(value)
    if whole.layout != torch.strided or whole.is_meta:
        return 0
    try:
        return whole.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # fake tensors and other subclasses without memory
        return 0


# States that a model carries from call to call.

#: By the id of a holder: the places of rows that recorded calls have written, and in which dimension the batch is.
_carried: dict[int, tuple[weakref.ref[Any], dict[tuple[str, Any], Place]]] = {}
_lock = threading.Lock()


def entries(place: Attribute, value: Any, kind: type) -> Iterator[tuple[Entry, Any]]:
    """Yield the values of this kind in an attribute: itself, or what a list or dictionary holds."""
    if isinstance(value, kind):
        yield (*place, None), value
    elif type(value) in _CONTAINERS and value and not isinstance(value, set):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        yield from (((*place, key), item) for key, item in pairs if isinstance(item, kind))


def mapped(place: Attribute, value: Any, function: Callable[[Entry, Any], Any]) -> Any:
    """Apply a function to an attribute's value, or to each that a list or dictionary holds; sets stay."""
    if type(value) not in _CONTAINERS or isinstance(value, set):
        return function((*place, None), value)
    made = value.copy()
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        made[key] = function((*place, key), item)
    return made


def table_of(holder: Any, name: str, key: Any) -> tuple[Any, Any]:
    """Return the dict or list that holds a place, and the key in it; ``key`` None is the attribute itself."""
    return (vars(holder), name) if key is None else (vars(holder).get(name), key)


def remember_rows(holder: Any, name: str, key: Any, place: Place) -> bool:
    """Note that a call wrote rows there, so that the next one gives each sample its own; False if it cannot."""
    with _lock:
        ref, found = _carried.get(id(holder), (None, {}))
        if ref is None or ref() is not holder:
            at, found, forget = id(holder), {}, _carried.pop
            try:
                _carried[at] = weakref.ref(holder, lambda _: forget(at, None)), found
            except TypeError:  # it cannot be referred to weakly
                return False
        found[name, key] = place
    return True


def inherit_rows(model: nn.Module, other: nn.Module) -> None:
    """Have the modules of a copy of ``model`` know which attributes hold rows."""
    for module, own in zip(model.modules(), other.modules(), strict=True) if _carried else ():
        ref, places = _carried.get(id(module), (None, {}))
        for (name, key), place in list(places.items()) if ref is not None and ref() is module else ():
            remember_rows(own, name, key, place)


#: A state: its holder, name and key, the batch's tensor, and where the batch is in it.
State = tuple[Any, str, Any, Tensor, Place]


def carried_states(holders: Iterable[Any], samples: int) -> list[State]:
    """Return the rows that earlier calls wrote to attributes, where these have one for each sample."""
    found: list[State] = []
    for holder in holders if _carried and samples > 1 else ():
        ref, places = _carried.get(id(holder), (None, {}))
        for (name, key), place in list(places.items()) if ref is not None and ref() is holder else ():
            table, at = table_of(holder, name, key)
            try:
                value = table[at]
            except (KeyError, IndexError, TypeError):
                continue
            if isinstance(value, Tensor) and value.dim() > (place or 0) and value.shape[place or 0] == samples:
                found.append((holder, name, key, value, place))
    return found


class States:
    """The states among a model's attributes that carry the batch, given to its samples by rows."""

    def __init__(self, snapshot: Snapshot, samples: int) -> None:
        self._samples = samples
        #: Each state: its holder, name and key, the batch's tensor, and where the batch is in it.
        self.found = carried_states(snapshot.holders(), samples)
        #: By id, other tensors in attributes, no buffers, that have a row for each sample, and their names.
        self.doubtful = {
            id(t): snapshot.name(entry)
            for entry, t in snapshot.tensors
            if samples > 1 and t.dim() and t.shape[0] == samples and not isinstance(t, nn.Parameter)
        }

    def holds(self, holder: Any, name: str, key: Any) -> bool:
        """Whether this place is given by rows."""
        return any(holder is own and (name, key) == (n, k) for own, n, k, _, _ in self.found)

    def nodes(self) -> list[Any]:
        """Return the graph nodes that computed the states."""
        return [value.grad_fn for _, _, _, value, _ in self.found if value.grad_fn is not None]

    @contextlib.contextmanager
    def given(self, wrap: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Put ``wrap(rows (B, *shape))`` in the place of each state inside; what the model leaves there stays."""
        own = []
        try:
            for holder, name, key, value, place in self.found:
                table, at = table_of(holder, name, key)
                table[at] = wrap(split(value, place, self._samples))
                own.append((table, at, table[at], value))
            yield
        finally:
            for table, at, given, value in own:
                with contextlib.suppress(KeyError, IndexError):
                    if table[at] is given:
                        table[at] = value
