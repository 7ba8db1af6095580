"""Addresses on shapes that no memory holds: inside their operands, and those of 64-bit arithmetic.

Operands are meta tensors; each gets a range of addresses of its own, far from the others. The first, the last and the
middle program of a launch run: they read made-up values and write nothing. A second run hands every integer over in 64
bits. Where an offset of the first run leaves 32 bits on the way, its addresses differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from bench.gpu.compile_cases import as_if_on
from bench.gpu.sanitize.interpreter import Watcher, watching
from bench.gpu.sanitize.memory import SanitizerError
from fastgrad.ops import tune

#: Addresses between two operands; no operand reaches so far.
APART = 1 << 50


class _Pointer:
    """An operand without memory, as the interpreter takes one."""

    def __init__(self, tensor: Tensor, address: int) -> None:
        self.dtype, self._address = tensor.dtype, address

    def data_ptr(self) -> int:
        return self._address


class _Addresses(Watcher):
    """Records the addresses of some programs and answers with made-up values.

    Args:
        integer: What integers in memory are.
    """

    def __init__(self, integer: int) -> None:
        self.integer = integer
        self.spans: list[tuple[int, int]] = []
        self.bases: dict[int, int] = {}
        self.seen: list[np.ndarray] = []
        self.kernel = ""

    def launch(self, kernel: str, arguments: dict[str, Any], programs: int) -> Sequence[int]:
        self.kernel, self.arrivals = kernel, _arrivals(arguments)
        for name, tensor in arguments.items():
            if isinstance(tensor, Tensor):
                arguments[name] = _Pointer(tensor, self._base(tensor))
        return sorted({0, programs // 2, programs - 1})

    def _base(self, tensor: Tensor) -> int:
        """Views of one storage share a range; bounds are those of the storage's elements that the view reaches."""
        key = tensor.untyped_storage()._cdata
        base = self.bases.setdefault(key, (len(self.bases) + 1) * APART)
        first = base + int(tensor.storage_offset()) * tensor.itemsize
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.spans.append((first, first + (reach + 1) * tensor.itemsize))
        return first  # type: ignore[return-value]

    def _note(self, addresses: np.ndarray) -> None:
        at = addresses.astype(np.int64)
        inside = np.zeros(at.shape, bool)
        for start, stop in self.spans:
            inside |= (at >= start) & (at < stop)
        if not inside.all():
            raise SanitizerError(f"{self.kernel}: an address lies outside every operand")
        self.seen.append(at)

    def load(self, addresses: np.ndarray, width: int) -> np.ndarray:
        self._note(addresses)
        return np.full(addresses.shape, self.integer)

    def store(self, addresses: np.ndarray, width: int) -> bool:
        self._note(addresses)
        return True

    def atomic(self, addresses: np.ndarray, ordered: bool) -> np.ndarray:
        self._note(addresses)
        return np.full(addresses.shape, self.arrivals)


def _arrivals(arguments: dict[str, Any]) -> int:
    """How many programs came before the one that finishes a row block."""
    if "splits" in arguments:
        return int(arguments["splits"]) - 1
    if "GROUP_M" in arguments:
        return tune.cdiv(arguments["N_units"] * arguments["ALIGN_N"], arguments["BLOCK_N"]) - 1
    return 0


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """Integers reach the kernels in 64 bits, and programs are counted in them."""
    import triton.language as tl

    convert, builder, semantic = (
        interpreter._implicit_cvt, interpreter.InterpreterBuilder, type(interpreter.interpreter_semantic),
    )  # fmt: skip
    program_id, semantic_id = builder.create_get_program_id, semantic.program_id

    def as_wide(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.int64), tl.int64), tl.int64)
        return convert(value)

    def wide_id(self: Any, axis: int) -> Any:
        return interpreter.TensorHandle(np.array([self.grid_idx[axis]], np.int64), tl.int64)

    interpreter._implicit_cvt = as_wide
    builder.create_get_program_id = wide_id
    semantic.program_id = lambda self, axis: self.tensor(self.builder.create_get_program_id(axis), tl.int64)
    try:
        yield
    finally:
        interpreter._implicit_cvt, builder.create_get_program_id = convert, program_id
        semantic.program_id = semantic_id


def check(call: Callable[[], object], architecture: tune.Architecture, integer: int = 1) -> int:
    """Run a launcher on meta tensors and compare; returns how many addresses were compared.

    Args:
        call: Runs it.
        architecture: Whose configuration is taken.
        integer: What integers in memory are: flags, class indices.

    Raises:
        SanitizerError: An address lies outside every operand, or 64-bit arithmetic gives another.
    """
    narrow, wide = _Addresses(integer), _Addresses(integer)
    with as_if_on(architecture), torch.no_grad():
        with watching(narrow, on_tensors=False):
            call()
        with watching(wide, on_tensors=False), _wide():
            call()
    same = len(narrow.seen) == len(wide.seen) and all(map(np.array_equal, narrow.seen, wide.seen))
    if not same:
        raise SanitizerError(f"{narrow.kernel}: 64-bit arithmetic gives other addresses")
    return sum(part.size for part in narrow.seen)
