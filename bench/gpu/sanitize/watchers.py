"""Find faults in programs' memory operations: on real operands, or at addresses of operands without memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("the sanitizer interprets kernels: TRITON_INTERPRET=1 must be set before Triton is imported")

from triton.runtime import interpreter

from fastgrad.ops.triton import devices

#: Bytes between the addresses of two operands without memory, more than any operand spans.
APART = 1 << 50


@contextlib.contextmanager
def patching_once() -> Iterator[None]:
    """Let the interpreter patch the language only once for each launch and module.

    Otherwise it does so in every call of a device function, which takes half the time of a launch.
    """
    executor, patch = interpreter.GridExecutor, interpreter._patch_lang
    launch, patched = executor.__call__, dict[int, Any]()

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def once(function: Any) -> Any:
        names = id(function.__globals__)
        if names not in patched:
            patched[names] = patch(function)
        return patched[names]

    with mock.patch.object(executor, "__call__", begin), mock.patch.object(interpreter, "_patch_lang", once):
        yield


@contextlib.contextmanager
def watching(watcher: Any) -> Iterator[None]:
    """Let a watcher see and steer every launch in the context; it may replace operands, which are on the CPU.

    Its ``launch`` may replace arguments, and returns the programs to run, in order. Its ``load`` returns a number to
    use instead of the value in memory, or None; its ``store`` returns whether to skip the write. Atomic operations are
    refused: no kernel needs one.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    dim, index = builder.set_grid_dim, builder.set_grid_idx

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        (size,) = self.grid
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        programs = watcher.launch(self.fn.__name__, named, size)
        self.grid = (len(programs),)
        with mock.patch.multiple(
            builder,
            set_grid_dim=lambda self, *_: dim(self, size, 1, 1),
            set_grid_idx=lambda self, x, *_: index(self, programs[x], 0, 0),
        ):
            call(self, **named)

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        kind = ptrs.get_element_ty()
        number = watcher.load(ptrs.data[mask.data], kind.primitive_bitwidth // 8)
        if number is None:
            return load(self, ptrs, mask, other, *rest)
        return interpreter.TensorHandle(np.full(ptrs.data.shape, number, interpreter._get_np_dtype(kind)), kind)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        skip = watcher.store(ptrs.data[mask.data], ptrs.get_element_ty().primitive_bitwidth // 8)
        return None if skip else store(self, ptrs, value, mask, *rest)

    def atomic_rmw(self: Any, *rest: Any) -> Any:
        raise SanitizerError(f"{watcher.kernel}: an atomic operation, of which not every order is run")

    with (
        mock.patch.multiple(
            builder, create_masked_load=masked_load, create_masked_store=masked_store, create_atomic_rmw=atomic_rmw
        ),
        # The interpreter would copy operands to the CPU and back.
        mock.patch.multiple(
            executor,
            __call__=launch,
            _init_args_hst=lambda self, args, kwargs: (args, kwargs),
            _restore_args_dev=lambda self, *args: None,
        ),
        np.errstate(all="ignore"),
        patching_once(),
    ):
        yield


class SanitizerError(AssertionError):
    """A memory operation that a kernel must not make."""


def reach(tensor: Tensor) -> int:
    """Return how many elements lie between the first of a view and its last, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


class _Region:
    """The shadow of one allocation, byte by byte.

    Attributes:
        width: Bytes of the element that starts here, 0 if none does: between rows, or within an element.
        written: Whether the byte has been written.
        writer, reader: The program that last wrote and read it in this launch; -1 before.
    """

    def __init__(self, tensor: Tensor, fresh: bool, constant: bool) -> None:
        self.storage = tensor.untyped_storage()  # kept, so that no other allocation takes its place
        self.base, size, self.constant = self.storage.data_ptr(), self.storage.nbytes(), constant
        self.width, self.written = np.zeros(size, np.int8), np.full(size, not fresh)
        self.writer, self.reader = np.full((2, size), -1)


class Memory:
    """Checks every memory operation of the launches that it watches.

    Nothing orders two programs of a launch, so none may touch an address that another one writes; the result then does
    not depend on how they interleave. No kernel may write ``inputs``. ``order`` returns the order in which a number of
    programs run.
    """

    def __init__(self, inputs: Sequence[Tensor], order: Callable[[int], Sequence[int]] = range) -> None:
        self.order = order
        self.regions: dict[int, _Region] = {}
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}

    def allocating(self) -> Any:
        """Treat memory that launchers allocate in the context as never written; it holds NaN."""

        def empty(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
            made = torch.full(tuple(shape), torch.nan, dtype=dtype)
            self.regions[made.untyped_storage().data_ptr()] = _Region(made, fresh=True, constant=False)
            return made

        return mock.patch.object(devices, "empty", empty)

    def launch(self, kernel: str, arguments: dict[str, Any], programs: int) -> Sequence[int]:
        self.kernel = kernel
        for tensor in arguments.values():
            if isinstance(tensor, Tensor):
                base = tensor.untyped_storage().data_ptr()
                if base not in self.regions:
                    self.regions[base] = _Region(tensor, fresh=False, constant=base in self.inputs)
                offsets = torch.arange(reach(tensor)).as_strided(tensor.shape, tensor.stride()).flatten().numpy()
                self.regions[base].width[tensor.data_ptr() - base + offsets * tensor.itemsize] = tensor.itemsize
        for region in self.regions.values():
            region.writer[:] = region.reader[:] = -1
        self.bases = np.array(sorted(self.regions))
        return self.order(programs)

    def load(self, addresses: np.ndarray, width: int) -> None:
        for region, at in self._located(addresses, width, "reads"):
            if not region.written[at].all():
                self._fault("reads what nobody wrote")
            self._ordered(region.writer[at], "reads what program {} writes")
            region.reader[at] = self.program

    def store(self, addresses: np.ndarray, width: int) -> bool:
        for region, at in self._located(addresses, width, "writes"):
            if region.constant:
                self._fault("writes an input")
            self._ordered(region.writer[at], "writes what program {} writes")
            self._ordered(region.reader[at], "writes what program {} reads")
            region.written[at] = True
            region.writer[at] = self.program
        return False

    @property
    def program(self) -> int:
        return int(interpreter.interpreter_builder.grid_idx[0])

    def _fault(self, does: str) -> None:
        raise SanitizerError(f"{self.kernel}: program {self.program} {does}")

    def _located(self, addresses: np.ndarray, width: int, does: str) -> list[tuple[_Region, np.ndarray]]:
        """Return regions and the bytes in them; an address that is no element is a fault."""
        addresses = addresses.astype(np.int64)
        index = np.searchsorted(self.bases, addresses, "right") - 1
        located = []
        for i in np.unique(index):
            region = self.regions[int(self.bases[i])]
            at = addresses[index == i] - region.base
            if i < 0 or (at >= len(region.width)).any() or (region.width[at] != width).any():
                self._fault(f"{does} {width} bytes that no operand holds")
            located.append((region, at))
        return located

    def _ordered(self, earlier: np.ndarray, does: str) -> None:
        """Raise if another program touched the bytes."""
        others = earlier[(earlier >= 0) & (earlier != self.program)]
        if others.size:
            self._fault(f"{does.format(others[0])}, and nothing orders them")


class Addresses:
    """Checks the addresses and the 32-bit arithmetic of the first, the middle and the last program of a launch.

    Operands are meta tensors; each gets addresses of its own. Programs read ``integer`` and write nothing.
    """

    def __init__(self, integer: int) -> None:
        self.integer, self.count = integer, 0

    def launch(self, kernel: str, arguments: dict[str, Any], programs: int) -> Sequence[int]:
        self.kernel = kernel
        self.spans: list[tuple[int, int]] = []
        for name, tensor in arguments.items():
            if isinstance(tensor, Tensor):
                first = (len(self.spans) + 1) * APART
                self.spans.append((first, first + reach(tensor) * tensor.itemsize))
                # The interpreter takes this as a pointer.
                arguments[name] = SimpleNamespace(dtype=tensor.dtype, data_ptr=partial(int, first))
        return sorted({0, programs // 2, programs - 1})

    def _note(self, addresses: np.ndarray) -> None:
        at = addresses.astype(np.int64)
        if not np.any([(at >= start) & (at < stop) for start, stop in self.spans], axis=0).all():
            raise SanitizerError(f"{self.kernel}: an address lies outside every operand")
        self.count += at.size

    def load(self, addresses: np.ndarray, width: int) -> int:
        self._note(addresses)
        return self.integer

    def store(self, addresses: np.ndarray, width: int) -> bool:
        self._note(addresses)
        return True
