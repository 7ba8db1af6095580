"""Count what a kernel loads, stores and multiplies by running it in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Counts:
    """Bytes of loads and stores, operations of products."""

    loaded: int = 0
    stored: int = 0
    product: int = 0


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count everything that kernels do inside the block; needs ``TRITON_INTERPRET=1`` from the start of the process."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = Counts()
    names = ("create_masked_load", "create_masked_store", "create_dot")
    saved = {name: getattr(InterpreterBuilder, name) for name in names}

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        counts.loaded += int(mask.data.sum()) * int(ptrs.get_element_ty().primitive_bitwidth) // 8
        return saved["create_masked_load"](self, ptrs, mask, *rest)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counts.stored += int(mask.data.sum()) * value.data.dtype.itemsize
        return saved["create_masked_store"](self, ptrs, value, mask, *rest)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        counts.product += 2 * a.data.size * b.data.shape[-1]
        return saved["create_dot"](self, a, b, d, *rest)

    try:
        for name, function in zip(names, (load, store, dot), strict=True):
            setattr(InterpreterBuilder, name, function)
        yield counts
    finally:
        for name, function in saved.items():
            setattr(InterpreterBuilder, name, function)
