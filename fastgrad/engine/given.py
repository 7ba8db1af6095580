"""Objects among the inputs of a model, such as a cache of keys and values, which it may write to.

Trials, and layers that run again, are given copies of them, so that the user's stay as they were at the call.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable
from copy import copy as shallow_copy
from typing import Any

from torch import Tensor, nn

from fastgrad._torch import pytree
from fastgrad.engine.copy import CONTAINERS, PLAIN, detach_plain


def apart(value: Any, tensor: Callable[[Tensor], Tensor], known: dict[int, Any] | None = None) -> Any:
    """A copy of an object that a module is given and may write to, as a cache of keys and values, at all depths.

    ``tensor`` gives what it holds in place of each tensor. Modules, functions and classes are shared.
    """
    if isinstance(value, Tensor):
        return tensor(value)
    if type(value) in PLAIN or isinstance(value, (nn.Module, type, enum.Enum)) or callable(value):
        return value
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)]
    held = getattr(value, "__dict__", None)
    if type(value) not in (*CONTAINERS, defaultdict) and type(held) is not dict:
        return value
    try:
        made = shallow_copy(value)
    except Exception:
        # What cannot be copied is shared, as a handle of the system's.
        return value
    # Objects may lead back to themselves.
    known[id(value)] = made
    if type(value) is tuple:
        made = known[id(value)] = tuple(apart(item, tensor, known) for item in value)
    else:
        _fill(made, value, lambda item: apart(item, tensor, known))
    return made


def _fill(target: Any, source: Any, each: Callable[[Any], Any]) -> None:
    """Have an object hold what another of its type holds, item by item."""
    if type(getattr(source, "__dict__", None)) is dict:
        held = {name: each(item) for name, item in source.__dict__.items()}
        target.__dict__.clear()
        target.__dict__.update(held)
    if isinstance(source, dict):
        items = {key: each(item) for key, item in source.items()}
        target.clear()
        target.update(items)
    elif isinstance(source, list):
        target[:] = [each(item) for item in source]
    elif isinstance(source, set):
        members = set(source)
        target.clear()
        target.update(members)


def unwritten(inputs: Any) -> Any:
    """Inputs of a pass that leaves the user's objects as they are: see `apart`; tensors among them are the same."""
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, Tensor) else apart(leaf, detach_plain), inputs)


class Given:
    """Objects among the inputs of a pass, as a cache of keys and values, to give them back what they held before.

    Attributes:
        tensors: Those that the objects held.
    """

    def __init__(self, inputs: Any) -> None:
        self.tensors: list[Tensor] = []
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if not isinstance(leaf, Tensor)]
        copies = [(leaf, apart(leaf, self._hold)) for leaf in leaves]
        self._held = [(leaf, kept) for leaf, kept in copies if kept is not leaf]

    def _hold(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def restore(self) -> None:
        """Give back everything but what was written to the tensors."""
        # They may lead back to themselves.
        known = {id(kept): leaf for leaf, kept in self._held}
        for leaf, kept in self._held:
            _fill(leaf, kept, lambda item: apart(item, lambda tensor: tensor, known))
