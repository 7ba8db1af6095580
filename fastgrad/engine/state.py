"""What a forward pass depends on, and may change: random numbers, parameters, buffers, objects among its inputs."""

from __future__ import annotations

import contextlib
import enum
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy as shallow_copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgrad._torch import is_fake, is_wrapped, own_parametrizations, pytree
from fastgrad.batches import input_tensors, same_class
from fastgrad.engine.copy import CONTAINERS, PLAIN
from fastgrad.engine.objects import holds_same, refill
from fastgrad.engine.steps import in_place


class Versions:
    """Versions of tensors, to see which were modified in place since; leaves out inference tensors and None."""

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self._tensors = [t for t in tensors if t is not None and not t.is_inference()]
        self._versions = [t._version for t in self._tensors]

    def modified(self) -> list[Tensor]:
        """Return the tensors that were modified."""
        return [t for t, version in zip(self._tensors, self._versions, strict=True) if t._version != version]


class RandomState:
    """State of the generators that these modules may draw from: PyTorch's on their devices, NumPy's and Python's."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        devices = {p.device for module in modules for p in module._parameters.values() if p is not None}
        self._devices = sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)
        self._torch = self._read()
        self._numpy: Any = np.random.get_state()  # noqa: NPY002  (the state that models draw from)
        self._python = random.getstate()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]

    def same(self) -> bool:
        """Whether nothing was drawn since."""
        _, keys, *rest = np.random.get_state()  # noqa: NPY002
        return (
            all(map(torch.equal, self._read(), self._torch))
            and random.getstate() == self._python
            and rest == list(self._numpy[2:])
            and np.array_equal(keys, self._numpy[1])
        )

    def restore(self) -> None:
        """Restore the states."""
        torch.set_rng_state(self._torch[0])
        for device, state in zip(self._devices, self._torch[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


#: Originals and their copies, by id of the original, which is held so that nothing else gets its id.
Copied = dict[int, tuple[Any, Any]]


def apart(value: Any, tensor: Callable[[Tensor], Tensor], known: Copied | None = None) -> Any:
    """Return a deep copy of an object that a module is given and may write to, as a cache of keys and values.

    ``tensor`` returns what it holds in place of each tensor. Modules, functions and classes are shared. Each object is
    copied only once, also in several calls with the same ``known``.
    """
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)][1]
    if isinstance(value, Tensor):
        known[id(value)] = value, tensor(value)
        return known[id(value)][1]
    if type(value) in PLAIN or isinstance(value, enum.Enum) or callable(value):
        return value
    held = getattr(value, "__dict__", None)
    if type(value) not in (*CONTAINERS, defaultdict) and type(held) is not dict:
        return value
    try:
        made = shallow_copy(value)
    except Exception:
        # Objects that cannot be copied are shared, as handles of the system.
        return value
    # Before its items, because objects may refer back to themselves.
    known[id(value)] = value, made
    if type(value) is tuple:
        made = tuple(apart(item, tensor, known) for item in value)
        known[id(value)] = value, made
    else:
        _fill(made, value, lambda item: apart(item, tensor, known))
    return made


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _fill(target: Any, source: Any, each: Callable[[Any], Any]) -> None:
    """Fill an object with what another of its type holds, item by item."""
    if type(getattr(source, "__dict__", None)) is dict:
        held = {name: each(item) for name, item in source.__dict__.items()}
        target.__dict__.clear()
        target.__dict__.update(held)
    if isinstance(source, dict):
        refill(target, {key: each(item) for key, item in source.items()})
    elif isinstance(source, list):
        refill(target, [each(item) for item in source])
    elif isinstance(source, set):
        refill(target, set(source))


class Snapshot:
    """Random numbers, buffers and inputs before a forward pass, to undo its changes.

    With ``training``, buffers of modules in training mode are copied; other buffers, and tensors in attributes, only
    with ``every``. Objects among the inputs, as a cache of keys and values, get back what they held.
    """

    def __init__(
        self, modules: Sequence[nn.Module], *, training: bool = True, every: bool = False, inputs: Any = ()
    ) -> None:
        self._random = RandomState(modules)
        copied: list[Tensor | None] = []
        kept: list[Tensor | None] = []
        for module in modules:
            if module._buffers:
                (copied if every or (training and module.training) else kept).extend(module._buffers.values())
            if every:
                copied.extend(
                    value for value in vars(module).values() if type(value) is Tensor and _may_be_written(value)
                )
        self._copied = Versions(copied)
        self._values = {id(b): b.detach().clone() for b in copied if b is not None}
        self._kept = Versions(kept)
        known: Copied = {}
        copies = [(leaf, apart(leaf, _itself, known)) for leaf in pytree.tree_leaves(inputs)]
        self._objects = [(leaf, kept) for leaf, kept in copies if kept is not leaf]
        self._inputs = Versions(value for value, _ in known.values() if isinstance(value, Tensor))

    def restore(self) -> None:
        """Restore everything; ValueError if an input tensor or a buffer without a copy was written to."""
        self._random.restore()
        _put_back((tensor, self._values[id(tensor)]) for tensor in self._copied.modified())
        # Objects may refer back to themselves.
        known: Copied = {id(copy): (copy, leaf) for leaf, copy in self._objects}
        for leaf, copy in self._objects:
            _fill(leaf, copy, lambda item: apart(item, _itself, known))
        for what, tensors in (("buffers", self._kept), ("inputs", self._inputs)):
            for tensor in tensors.modified():
                raise ValueError(
                    f"model must not write to its {what} in a call whose path was not seen before; a tensor of shape "
                    f"{tuple(tensor.shape)} was written. Make the same call again, with the inputs as they were"
                )


class Copies:
    """Copies of tensors for passes that may write to them.

    Those in ``shared`` may be large: one copy serves all passes until it is written to. The caller keeps them alive.
    """

    def __init__(self, shared: Any = ()) -> None:
        known: Copied = {}
        pytree.tree_map(lambda leaf: apart(leaf, _itself, known), shared)
        self._shared = set(known)
        self._made: dict[int, tuple[Tensor, Versions]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a copy outside of any graph, of the same class."""
        known = self._made.get(id(tensor))
        if known and not known[1].modified():
            return same_class(known[0].detach(), tensor)
        made = tensor.clone().detach()
        if id(tensor) in self._shared:
            self._made[id(tensor)] = made, Versions([made])
        return same_class(made.detach(), tensor)


#: Functions that write no numbers, or the same at every call: embedding_renorm_ limits the norms of looked-up rows.
_SPARING = frozenset({"embedding_renorm_", "requires_grad_", "detach_"})
#: Functions that may change nothing more when called again, as a product with a mask.
_BOUNDING = frozenset({"mul_", "masked_fill_", "clamp_", "clamp_min_", "clamp_max_", "clip_"})


class ReadOnly(TorchFunctionMode):
    """Refuses functions that would change parameters of ``model`` each time that a pass runs again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        pointers = ((_pointer(p), name) for name, p in model.named_parameters())
        self._names = {pointer: name for pointer, name in pointers if pointer}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call, unless it writes to parameters without a change; ValueError if it could change one each time."""
        name, named = getattr(func, "__name__", ""), kwargs or {}
        target = args[:1] if in_place(name) and name not in _SPARING else ()
        leaves = input_tensors(target, named.get("out")) if target or named else []
        # In a form that PyTorch 2.8 can compile, as it does within torch.cond.
        if written := [self._names[place] for place in map(_pointer, leaves) if place in self._names]:
            again = changed = True
            with torch.no_grad():
                once, twice = (pytree.tree_map_only(Tensor, Tensor.clone, target) for _ in range(2))
                # While a graph is traced, there are no numbers to compare.
                if target and not any(map(is_fake, input_tensors(once))):
                    for tried in (once, twice, twice):
                        func(*tried, *args[1:], **named)
                    changed = _differ(target, once)
                    again = _differ(once, twice) if name in _BOUNDING else changed
            if again:
                raise ValueError(
                    "model must not write to its parameters in forward, parts of which run several times; "
                    f"{name!r} wrote to {written[0]!r}. Write outside of forward, or where a first call alone does "
                    "so, make it before"
                )
            if not changed:
                # Writing would raise the version, and graphs would refuse the tensor that they saved.
                return args[0] if isinstance(args[0], Tensor) and name != "__setitem__" else None
        return func(*args, **named)


def _differ(one: Any, other: Any) -> bool:
    """Whether two trees of tensors differ in any number."""
    return not all(map(torch.equal, pytree.tree_leaves(one), pytree.tree_leaves(other)))


def _pointer(tensor: Tensor) -> int:
    """Return the address of a plain tensor's storage; 0 for any other tensor."""
    return tensor.untyped_storage().data_ptr() if _is_plain(tensor) else 0


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is strided, of no subclass but Parameter, on a device with values, and under no transform."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and not is_wrapped(tensor)


def _may_be_written(tensor: Tensor) -> bool:
    """Whether a plain tensor has memory for each of its numbers; a copy of any other may be larger than its memory."""
    return _is_plain(tensor) and tensor.nbytes <= tensor.untyped_storage().nbytes()


@contextlib.contextmanager
def undone(model: nn.Module, inputs: Any = (), copies: Copies | None = None) -> Iterator[Any]:
    """Undo what passes do to random numbers and buffers; yield a copy of ``inputs``, which they may write to.

    Raise ValueError before a pass writes to a parameter in a way that `ReadOnly` refuses.
    """
    before = Snapshot(list(model.modules()), every=True)
    copy, known = copies or Copies(), Copied()
    try:
        with own_parametrizations(), ReadOnly(model):
            yield pytree.tree_map(lambda leaf: apart(leaf, copy, known), inputs)
    finally:
        before.restore()


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of modules and their numbers.

    Quantization observers change buffers in evaluation mode, too, and a forward pass may replace them. If it also
    replaces other attributes, the new buffers stay, because a table goes with its length.
    """
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if _may_be_written(buffer)]
    # Buffers of a scripted module cannot be replaced.
    held = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules() if isinstance(m._buffers, dict)]
    try:
        yield
    finally:
        if all(holds_same(vars(m), own) and m._buffers.keys() == buffers.keys() for m, own, buffers in held):
            for module, _, buffers in held:
                module._buffers.update(buffers)
        _put_back(pair for pair in before if _have_changed(*pair))


def _have_changed(tensor: Tensor, value: Tensor) -> bool:
    """Whether a tensor's numbers differ from ``value``; kernels of observers change them without a new version."""
    try:
        return not torch.equal(tensor, value)
    except NotImplementedError:
        # Formats that cannot be compared, as of four bits, are not written to by any function.
        return False


def _put_back(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Restore the values and sizes of tensors."""
    with torch.no_grad():
        for tensor, value in pairs:
            (tensor if tensor.shape == value.shape else tensor.resize_(value.shape)).copy_(value)


class Unchanged:
    """A module's own parameters and buffers at its call, to be unchanged in the backward pass; ``path`` names it."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self._path, self._module = path, module
        self._versions = Versions([*module._parameters.values(), *module._buffers.values()])

    def require(self) -> None:
        """Raise RuntimeError, as autograd does, if one was modified in place since."""
        if modified := self._versions.modified():
            own = {**self._module._parameters, **self._module._buffers}
            name = next((name for name, tensor in own.items() if tensor is modified[0]), "a tensor")
            raise RuntimeError(
                f"{name!r} of {self._path or type(self._module).__name__!r} must not be modified in place between the "
                "forward pass and its gradients; it was. Ask for the norms before the optimizer's step"
            )


class NotRepeatableError(ValueError):
    """A module that is computed again in the backward pass would not give the same result."""


class Repeatable:
    """Random numbers and buffers before a module's call, which computing it again must find unchanged."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._random = RandomState(module.modules())
        self._buffers = list(module.buffers())
        self._versions = Versions(self._buffers)

    def differs(self) -> str | None:
        """Return what another call would do, if the module drew numbers or changed a buffer since; else None."""
        if not self._random.same():
            return "draw other random numbers"
        replaced = [id(b) for b in self._module.buffers()] != [id(b) for b in self._buffers]
        return "find its buffers changed" if replaced or self._versions.modified() else None

    def require(self, name: str) -> None:
        """Raise NotRepeatableError if the module, called ``name`` in messages, drew numbers or changed a buffer."""
        if differs := self.differs():
            advice = "" if self._random.same() else ", set its dropout to 0, or give it what it draws as an input"
            raise NotRepeatableError(
                f"model must be in evaluation mode, because {name!r} is computed again in the backward pass and "
                f"would {differs}; call model.eval(){advice}"
            )
