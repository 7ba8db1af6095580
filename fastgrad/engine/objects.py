"""What a model counts or keeps in lists, dicts and objects of its attributes, and how that is given back."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastgrad.engine.copy import PLAIN, TABLES

#: Types of what `refill` takes.
_FILLED = frozenset((list, set, deque, dict, OrderedDict, defaultdict, Counter))


class Objects:
    """What objects in attributes of modules hold, as counters and lists of logs: copies of the model share them.

    A copy of such an object would no longer be the one that a hook, a function or another object holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, tuple[Any, Any]] = {}
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in TABLES:
                    _find_filled(value, self._found)

    def changed(self) -> list[tuple[Any, Any]]:
        """Those that hold something else now, each with a copy as it was."""
        return [(part, before) for part, before in self._found.values() if not _same(part, before)]

    def restore(self) -> None:
        """Give them back what they held."""
        for part, before in self.changed():
            refill(part, before)


@contextlib.contextmanager
def objects_kept(model: nn.Module) -> Iterator[Objects]:
    """The `Objects` of a model, restored at the end."""
    objects = Objects(model)
    try:
        yield objects
    finally:
        objects.restore()


def _find_filled(value: Any, found: dict[int, tuple[Any, Any]]) -> None:
    """Put into ``found`` by id what ``value`` consists of and may be filled again, each with a shallow copy."""
    if type(value) in PLAIN or isinstance(value, nn.Module):
        return
    held = getattr(value, "__dict__", None)
    # An object that holds others may be part of a program, which runs meanwhile, as a trainer.
    plain = type(held) is dict and all(type(item) in PLAIN or type(item) in _FILLED for item in held.values())
    parts: list[Any] = [value, held] if plain else [value]
    for part in parts:
        if type(part) in _FILLED and id(part) not in found:
            found[id(part)] = part, part.copy()
        elif type(part) is not tuple:
            continue
        items = part.values() if isinstance(part, dict) else part
        # Item by item a list of words would take longer than a pass.
        for item in () if PLAIN.issuperset(map(type, items)) else items:
            _find_filled(item, found)


def _same(part: Any, before: Any) -> bool:
    """Whether a list, dict or set holds the same objects as a copy of it."""
    if isinstance(part, set):  # without an order
        return bool(part == before)
    values = all(map(operator.is_, part.values(), before.values())) if isinstance(part, dict) else True
    return len(part) == len(before) and values and all(map(operator.is_, part, before))


def refill(target: Any, items: Any) -> None:
    """Have what can be emptied and filled again hold these items."""
    target.clear()
    (target.update if isinstance(target, (dict, set)) else target.extend)(items)
