"""Save and restore what a model counts or keeps in lists, dicts and objects of its attributes."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastgrad.engine.copy import PLAIN, TABLES

#: Types that `refill` accepts.
_FILLED = frozenset((list, set, deque, dict, OrderedDict, defaultdict, Counter))


class Objects:
    """Saved contents of objects in attributes of modules, as counters and logs, which copies of the model share.

    They are shared, because a hook, a function or another object may hold the same object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, tuple[Any, Any]] = {}
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in TABLES:
                    _find_filled(value, self._found)

    def changed(self) -> list[tuple[Any, Any]]:
        """Return the objects that hold something else now, each with a copy of what it held."""
        return [(part, before) for part, before in self._found.values() if not holds_same(part, before)]

    def restore(self) -> None:
        """Restore what the objects held."""
        for part, before in self.changed():
            refill(part, before)


@contextlib.contextmanager
def objects_kept(model: nn.Module) -> Iterator[Objects]:
    """Yield the `Objects` of a model, and restore them at the end."""
    objects = Objects(model)
    try:
        yield objects
    finally:
        objects.restore()


def _find_filled(value: Any, found: dict[int, tuple[Any, Any]]) -> None:
    """Add to ``found``, by id, the containers within ``value`` that `refill` accepts, each with a shallow copy."""
    if type(value) in PLAIN or isinstance(value, nn.Module):
        return
    held = getattr(value, "__dict__", None)
    # An object that holds other objects, as a trainer, may change meanwhile for reasons of its own.
    plain = type(held) is dict and all(type(item) in PLAIN or type(item) in _FILLED for item in held.values())
    parts: list[Any] = [value, held] if plain else [value]
    for part in parts:
        if type(part) in _FILLED and id(part) not in found:
            found[id(part)] = part, part.copy()
        elif type(part) is not tuple:
            continue
        items = part.values() if isinstance(part, dict) else part
        # Going through a list of words item by item would take longer than a pass.
        for item in () if PLAIN.issuperset(map(type, items)) else items:
            _find_filled(item, found)


def holds_same(part: Any, before: Any) -> bool:
    """Whether a list, dict or set holds the same objects as a copy of it."""
    if isinstance(part, set):  # without an order
        return bool(part == before)
    values = all(map(operator.is_, part.values(), before.values())) if isinstance(part, dict) else True
    return len(part) == len(before) and values and all(map(operator.is_, part, before))


def refill(target: Any, items: Any) -> None:
    """Replace the contents of a container with these items."""
    target.clear()
    (target.update if isinstance(target, (dict, set)) else target.extend)(items)
