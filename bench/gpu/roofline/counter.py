"""Count what a kernel loads, stores and computes by running it in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Counts:
    """Bytes of loads and stores, operations of products, other floating-point operations, exponentials among them."""

    loaded: int = 0
    stored: int = 0
    product: int = 0
    elementwise: int = 0
    exponentials: int = 0


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count everything that kernels do inside the block; needs ``TRITON_INTERPRET=1`` from the start of the process."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = Counts()
    names = ("create_masked_load", "create_masked_store", "create_dot", "binary_op", "unary_op", "ternary_op")
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

    def arithmetic(name: str) -> Any:
        def call(self: Any, *args: Any) -> Any:
            result = saved[name](self, *args)
            if result.data.dtype.kind == "f":
                counts.elementwise += result.data.size
                if args[-1] in (np.exp, np.exp2):
                    counts.exponentials += result.data.size
            return result

        return call

    InterpreterBuilder.create_masked_load = load
    InterpreterBuilder.create_masked_store = store
    InterpreterBuilder.create_dot = dot
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(InterpreterBuilder, name, arithmetic(name))
    try:
        yield counts
    finally:
        for name, function in saved.items():
            setattr(InterpreterBuilder, name, function)
