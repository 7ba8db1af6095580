"""A private copy of a module tree that shares the user's tensors.

Hooks, evaluation mode and swapped parameters go to the copy, so the user's model is never touched: there is
nothing to restore after an exception, and threads cannot disturb one another.
"""

from __future__ import annotations

import functools
import operator
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastgrad import _torch
from fastgrad.engine.hooks import attach_layouts

#: Types of containers that are searched for parts of a module tree.
CONTAINERS = (list, tuple, set, dict, OrderedDict)
#: Types whose values hold no part of a module tree.
PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Tensor))
#: Plain attributes of modules, by id of the user's module.
Settings = dict[int, dict[str, Any]]
_HOOK_TABLES = frozenset(
    name
    for name, value in vars(nn.Module()).items()
    if isinstance(value, dict) and name.endswith(("hooks", "kwargs", "called"))
)
#: Tables of hooks that run at calls, not for state dictionaries.
_CALLED = frozenset(name for name in _HOOK_TABLES if "state_dict" not in name)
#: Names of all tables that `nn.Module` itself keeps.
TABLES = _HOOK_TABLES | {"_parameters", "_buffers", "_modules"}
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def detach_plain(x: Tensor) -> Tensor:
    """Return ``x`` detached, and copied if it was made in inference mode, so that a graph can use it."""
    return x.clone().detach() if x.is_inference() else x.detach()


class Redirect:
    """A callable that replaces ``forward`` of a user's module while the module is recorded.

    ``call`` gets the module, its own ``forward`` and the inputs.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._own = module.__dict__.get("forward")
        self._forward = module.forward
        self._module, self._call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as ``forward`` of the module."""
        return self._call(self._module, self._forward, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Have copies and pickles of the module hold its own ``forward``, because nothing would restore it there."""
        return (getattr, (self._module, "forward")) if self._own is None else (functools.partial, (self._own,))

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the earlier ``forward`` in ``state``, a module's ``__dict__``."""
        if self._own is None:
            state.pop("forward", None)
        else:
            state["forward"] = self._own


class Shadow:
    """A copy of ``model``'s module tree, in evaluation mode by default, sharing parameters and buffers.

    Modules, parameters and bound methods of the tree are replaced wherever an attribute holds them, also inside
    lists, tuples, dicts, ``functools.partial`` and closures. Forward hooks of the user stay: they may change outputs.
    Backward hooks, which may change gradients, stay only if ``recorded``.

    ``parameter`` returns what the copy holds in place of a parameter; by default the detached one, so that autograd
    computes no weight gradient. With ``training``, modules keep their own mode. ``recorded`` means that the user's own
    call of ``model`` is under way. Hooks on ``model`` itself run in that call, and submodules keep their backward
    hooks. Lists, dicts and sets in attributes are copied, unless ``apart`` is False.
    """

    def __init__(
        self,
        model: nn.Module,
        parameter: Callable[[nn.Parameter], Tensor] = detach_plain,
        *,
        training: bool = False,
        recorded: bool = False,
        apart: bool = True,
    ) -> None:
        self.model, self.training, self.recorded = model, training, recorded
        self._parameter, self._apart, self._graded = parameter, apart, torch.is_grad_enabled()
        self._copies: dict[int, Any] = {}
        # Replacements of the user's lists, dicts and sets, by id, because several modules may hold one.
        self._containers: dict[int, Any] = {}
        # Plain attributes that may hold parts of the tree, and the replacements of those that did.
        self._attributes: list[tuple[dict[str, Any], str, Any]] = []
        self._followed: dict[tuple[int, str], Any] = {}
        # The user's tables of hooks with their replacements, and the replacements by the id of the user's table.
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
        self._tables: dict[int, dict[int, Any]] = {}
        #: Hooks with keys from this one on were added after the copy was made.
        self.next_hook: int = RemovableHandle.next_id
        #: The copy of each module by the id of the original, in the order they were met.
        self.modules: dict[int, nn.Module] = {}
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self._named: dict[str, nn.Module] = {}
        self.root: nn.Module = self._module(model, "")
        # Now that every module has a copy, replace what plain attributes hold.
        for state, name, value in self._attributes:
            replaced = self._replace(value)
            if replaced is not value:
                state[name] = replaced
                if not _are_handles(value):
                    self._followed[id(state), name] = replaced
        if not apart:
            # Hooks of the user's own call write to the user's own lists, also to those that hold modules.
            self._containers.clear()
        for _, own in self._hooks:
            own.update({key: self._replace(hook) for key, hook in own.items()})
        if recorded:
            # These hooks run around the copy, in the user's own call.
            state = self.root.__dict__
            for name in ("_forward_hooks", *BACKWARD_HOOKS):
                state[name] = OrderedDict()
            # Pre-hooks may compute weights from parameters, as weight norm does; the copy needs weights of its own.
            hooks, named = state["_forward_pre_hooks"], state["_forward_pre_hooks_with_kwargs"]
            state["_forward_pre_hooks"] = OrderedDict(
                (key, functools.partial(_run, hook, key in named)) for key, hook in hooks.items()
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy. In a recorded call, whatever the class or PyTorch adds around ``forward`` already runs."""
        root = self.root
        if not self.recorded:
            return root(*args, **kwargs)
        for hook in root._forward_pre_hooks.values():
            args, kwargs = hook(root, args, kwargs) or (args, kwargs)
        output = root.forward(*args, **kwargs)
        for key, hook in root._forward_hooks.items():
            # Hooks that the pass added run in the user's own call, after `write_back`.
            answer = hook(root, args, kwargs, output) if key < 0 else None
            output = output if answer is None else answer
        return output

    def submodule(self, path: str) -> nn.Module:
        """Return the copy of a module by its name within the model."""
        # get_submodule walks the tree each time, which for all layers takes as long as copying them.
        return self._named[path] if path in self._named else self.root.get_submodule(path)

    def stand_ins(self) -> dict[int, int]:
        """Return a number for each parameter and its copy, by id; both have the same number if ``recorded``."""
        numbers = {key: 2 * i + (not self.recorded) for i, key in enumerate(self._copies)}
        return numbers | {id(value): 2 * i for i, value in enumerate(self._copies.values())}

    def settings(self, module: nn.Module) -> Settings:
        """Return attributes without tensors or modules, of the copies of ``module`` and its descendants."""
        known: dict[int, Any] = {}
        return {
            id(part): {
                name: _own(value, known)
                for name, value in self.modules[id(part)].__dict__.items()
                if (type(value) in PLAIN and not isinstance(value, Tensor))
                or (name not in TABLES and _is_filled_plainly(value))
            }
            for part in module.modules()
        }

    def restore(self, settings: Settings, next_hook: int) -> None:
        """Set attributes that `settings` of another copy returned, and drop hooks with keys from ``next_hook`` on."""
        known: dict[int, Any] = {}
        for key, values in settings.items():
            state = self.modules[key].__dict__
            state.update({name: _own(value, known) for name, value in values.items()})
            for table in map(state.__getitem__, _HOOK_TABLES):
                for late in [hook for hook in table if hook >= next_hook]:
                    del table[late]

    def write_back(self) -> None:
        """Give the user's modules the attributes, buffers and hooks that the forward pass set on their copies.

        Hooks that the pass removed are removed, and its handles refer to hooks of the user's modules.
        """
        for table, own in self._hooks:
            for gone in [key for key in table if key < self.next_hook and key not in own]:
                del table[gone]
        # Added by this thread or another.
        added = RemovableHandle.next_id != self.next_hook
        for original, copy in self._pairs:
            state, before = copy.__dict__, original.__dict__
            for name in _HOOK_TABLES if added else ():
                late = {key: hook for key, hook in state[name].items() if key >= self.next_hook}
                before[name].update({key: self._back._replace(hook) for key, hook in late.items()})
            for name, value in state.items():
                if name in TABLES or name == "forward" or (name in before and value is before[name]):
                    continue
                followed = (id(state), name) in self._followed
                if not isinstance(value, nn.Module) and not (followed and value is self._followed[id(state), name]):
                    before[name] = self._back._replace(value) if followed or _are_handles(value) else value
            for name, value in state["_buffers"].items():
                known = before["_buffers"].get(name)
                if value is not known and not (isinstance(known, Tensor) and known.is_inference()):
                    before["_buffers"][name] = value

    @functools.cached_property
    def _back(self) -> Shadow:
        """The inverse, whose `_replace` replaces parts of the copy by the user's."""
        back = object.__new__(Shadow)
        back.__dict__.update(self.__dict__)
        back.modules, back._copies = {id(copy): original for original, copy in self._pairs}, {}
        back._containers = {}
        back._tables = {
            id(vars(copy)[name]): vars(original)[name] for original, copy in self._pairs for name in _HOOK_TABLES
        }
        return back

    def _module(self, module: nn.Module, prefix: str) -> nn.Module:
        known = self.modules.get(id(module))
        if known is not None:
            return known
        # Not the class's own __new__, which may make another class, as torch.fx does, or return one object each time.
        copy: nn.Module = object.__new__(module.__class__)
        state = module.__dict__.copy()
        # Not nn.Module's own __setattr__, which checks every value: a copy is made for every forward pass.
        object.__setattr__(copy, "__dict__", state)
        self.modules[id(module)] = copy
        self._pairs.append((module, copy))
        if not self.training:
            state["training"] = False
        forward = state.get("forward")
        if isinstance(forward, Redirect):
            forward.restore(state)
        if "forward" in state and state["forward"] == types.MethodType(type(module).forward, module):
            # The class's own method, left here by a library that replaced it for a while.
            del state["forward"]
        # The compiled call would run the user's own module and its tensors.
        state.pop("_compiled_call_impl", None)
        compiled = _torch.original(module)
        if compiled is not module:
            state["forward"] = self._module(compiled, f"{prefix}_orig_mod.")
        for name, value in state.items():
            # Most layers hold tuples of numbers.
            if type(value) in PLAIN or (type(value) is tuple and PLAIN.issuperset(map(type, value))):
                continue
            if name not in TABLES:
                self._attributes.append((state, name, value))
            elif name in _HOOK_TABLES and (value or name in _CALLED):
                # Empty ones, too: a forward pass may add hooks.
                own: dict[int, Any] = OrderedDict()
                state[name] = own
                if value:
                    self._tables[id(value)] = own
                    if self.recorded or name not in BACKWARD_HOOKS:
                        own.update(value)
                        self._hooks.append((value, own))
        state["_parameters"] = {
            name: None if value is None else self._tensor(value) for name, value in state["_parameters"].items()
        }
        state["_buffers"] = {
            name: detach_plain(value) if isinstance(value, Tensor) and value.is_inference() else value
            for name, value in state["_buffers"].items()
        }
        state["_modules"] = children = dict(state["_modules"])
        for name, child in children.items():
            if child is not None:
                children[name] = self._named[prefix + name] = self._module(child, f"{prefix}{name}.")
        if self._graded:
            attach_layouts(copy)
        return copy

    def _closure(self, function: types.FunctionType) -> Any:
        """Apply `_replace` to a function. It may share lists with modules: a hook may keep outputs in them."""
        contents = list(map(_content, function.__closure__ or ()))
        # Wrappers of a compiled function have this attribute, too, but do not hold the function.
        compiled = vars(function).get("_torchdynamo_orig_callable")
        if compiled is not None and any(it is compiled for it in contents):
            # A compiler cannot follow the hooks of a copy.
            replaced = self._replace(compiled)
            return function if replaced is compiled else replaced
        held = [self._replace(it) if type(it) is types.MethodType else self._known(it) for it in contents]
        if all(map(operator.is_, held, contents)):
            return function
        cells = tuple(
            cell if own is it else types.CellType(own)
            for cell, own, it in zip(function.__closure__ or (), held, contents, strict=True)
        )
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        return made

    def _known(self, value: Any) -> Any:
        """Return the replacement of a module, parameter or container of the tree; any other ``value`` itself."""
        tables: tuple[dict[int, Any], ...] = (self.modules, self._copies, self._containers)
        return next((table[id(value)] for table in tables if id(value) in table), value)

    def _tensor(self, parameter: nn.Parameter) -> Any:
        if id(parameter) not in self._copies:
            self._copies[id(parameter)] = value = self._parameter(parameter)
            if value is not parameter:
                # A module accepts nothing else in place of a parameter, as in ``self.weight *= mask``.
                value._is_param = True
        return self._copies[id(parameter)]

    def _replace(self, value: Any) -> Any:
        """Return ``value`` with all parts of the tree in it replaced; ``value`` itself if there are none."""
        if type(value) in PLAIN:
            return value
        if isinstance(value, nn.Module):
            return self.modules.get(id(value), value)
        if isinstance(value, nn.Parameter):
            return self._copies.get(id(value), value)
        if type(value) is RemovableHandle:
            tables = [self._tables.get(id(ref()), ref()) for ref in (value.hooks_dict_ref, *value.extra_dict_ref)]
            handle = object.__new__(RemovableHandle)
            handle.__setstate__((tables[0], value.id, tables[1:]))
            return handle
        if type(value) in CONTAINERS:
            if id(value) not in self._containers:
                self._containers[id(value)] = self._contained(value)
            return self._containers[id(value)]
        if isinstance(value, types.MethodType):
            owner = self._replace(value.__self__) if isinstance(value.__self__, nn.Module) else value.__self__
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if type(value) is functools.partial:
            function, args, keywords = map(self._replace, (value.func, value.args, value.keywords))
            if function is value.func and args is value.args and keywords is value.keywords:
                return value
            return functools.partial(function, *args, **keywords)
        return self._closure(value) if type(value) is types.FunctionType and value.__closure__ else value

    def _contained(self, value: Any) -> Any:
        """Apply `_replace` to a list, tuple, dict or set."""
        # Going through a list of words item by item would take longer than the pass.
        if PLAIN.issuperset(map(type, value.values() if isinstance(value, dict) else value)):
            return type(value)(value) if self._apart else value
        if isinstance(value, dict):
            items = {key: self._replace(item) for key, item in value.items()}
            same = all(items[key] is item for key, item in value.items())
            return value if same and not self._apart else type(value)(items)
        elements = [self._replace(item) for item in value]
        same = all(map(operator.is_, elements, value))
        return value if same and (not self._apart or type(value) is tuple) else type(value)(elements)


def _content(cell: types.CellType) -> Any:
    """Return the content of a closure's cell; None if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _are_handles(value: Any) -> bool:
    """Whether ``value`` is a handle of a hook, or holds nothing else."""
    if type(value) in CONTAINERS and value:
        return all(type(item) is RemovableHandle for item in (value.values() if isinstance(value, dict) else value))
    return type(value) is RemovableHandle


def _is_filled_plainly(value: Any) -> bool:
    """Whether ``value`` is a list, dict or set without parts of a module tree."""
    if type(value) in (dict, OrderedDict):
        return PLAIN.issuperset(map(type, value.values()))
    return type(value) in (list, set) and PLAIN.issuperset(map(type, value))


def _own(value: Any, known: dict[int, Any]) -> Any:
    """Return a shallow copy of a container, only one for each ``known``; any other ``value`` itself."""
    return known.setdefault(id(value), type(value)(value)) if type(value) in CONTAINERS else value


def _run(hook: Callable[..., Any], named: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Run a hook, with inputs by keyword if it is ``named``, and ignore what it returns."""
    hook(module, args, kwargs) if named else hook(module, args)
