"""Make a fitted part, from its arrays and options, an ``nn.Module`` that can be traced, moved and stored.

A fitted detector is then one graph for `torch.export` and one state dictionary for safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn


def as_buffer(values: object) -> Tensor:
    """Return ``values`` as a float64 tensor with its own memory, for a buffer."""
    return torch.from_numpy(np.array(values, dtype=np.float64))


class Fitted(nn.Module):
    """A module whose whole state is named tensors, JSON options and other `Fitted` children.

    Arguments become buffers (tensors), children (modules) or ``options`` (anything JSON can hold), so a subclass needs
    no code of its own to be stored and restored. Buffers keep their dtype when the module is moved: a detector inside a
    half-precision network still scores in float64.
    """

    kinds: ClassVar[dict[str, type[Fitted]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = Fitted.kinds.get(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise ValueError(f"a class of Fitted must have a name of its own, for files; {known!r} has this one")
        Fitted.kinds[cls.__name__] = cls

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = {}
        for name, value in parts.items():
            if isinstance(value, Tensor):
                # With one memory layout, products round alike before and after storage. Fitted values need no gradient.
                self.register_buffer(name, value.detach().contiguous())
            elif isinstance(value, nn.Module):
                self.add_module(name, value)
            else:
                self.options[name] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fitted:
        originals = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in originals.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def spec(self) -> dict[str, Any]:
        """Return what JSON must hold for `rebuild` to restore this module around its stored tensors."""
        return {
            "kind": type(self).__name__,
            "options": self.options,
            "tensors": sorted(name for name, _ in self.named_buffers(recurse=False)),
            "children": {name: child.spec() for name, child in self.named_children() if isinstance(child, Fitted)},
        }


class FittedList(Fitted):
    """An ordered list of named `Fitted` modules that can be stored."""

    def __iter__(self) -> Any:
        return iter(self.children())


def rebuild(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> Fitted:
    """Return the module that a `Fitted.spec` describes, with its ``tensors``; ValueError for an unknown kind."""
    kind = Fitted.kinds.get(str(spec.get("kind")))
    if kind is None:
        raise ValueError(f"the stored estimator has an unknown part {spec.get('kind')!r}")
    parts: dict[str, Any] = dict(spec["options"])
    for name in spec["tensors"]:
        parts[name] = tensors[prefix + name]
    for name, child in spec["children"].items():
        parts[name] = rebuild(child, tensors, f"{prefix}{name}.")
    module = kind.__new__(kind)
    Fitted.__init__(module, **parts)
    return module
