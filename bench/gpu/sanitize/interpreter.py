"""Watch what the programs of a launch do to memory, and choose the order in which they run."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError(
        "the sanitizer interprets kernels: TRITON_INTERPRET=1 must be set before Triton is imported"
    )

from triton.runtime import interpreter


class Watcher:
    """What `watching` tells of every launch; subclasses override what they need."""

    def launch(self, kernel: str, arguments: dict[str, Any], programs: int) -> Sequence[int]:
        """A launch begins; returns the programs to run, in order."""
        return range(programs)

    def run(self, programs: Sequence[int], body: Callable[[], None], select: Callable[[int], None]) -> None:
        """Run ``body`` for every program, after ``select(program)``."""
        for program in programs:
            select(program)
            body()

    def load(self, addresses: np.ndarray, width: int) -> np.ndarray | None:
        """Addresses are about to be read, ``width`` bytes each; returns values to take instead of reading."""

    def store(self, addresses: np.ndarray, width: int) -> bool:
        """Addresses are about to be written; returns whether not to."""
        return False

    def atomic(self, addresses: np.ndarray, ordered: bool) -> np.ndarray | None:
        """Addresses are about to be changed atomically; returns values to take as the old ones instead."""


class _Programs:
    """Stands in the executor's place of a kernel: its first call runs all programs, as the watcher says."""

    def __init__(self, kernel: Any, run: Callable[[Callable[[], None]], None]) -> None:
        self.kernel, self._run = kernel, run
        self.__globals__, self.__name__ = kernel.__globals__, kernel.__name__
        self.__signature__ = inspect.signature(kernel)

    def __call__(self, **arguments: Any) -> None:
        self._run(lambda: self.kernel(**arguments))


@contextlib.contextmanager
def patching_once() -> Iterator[None]:
    """Patch the language once a launch and module inside.

    The interpreter does so in every call of a device function, which takes half the time of a launch.
    """
    executor, function = interpreter.GridExecutor, interpreter.InterpretedFunction
    launch, call = executor.__call__, function.__call__
    patched: set[int] = set()

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.fn.__globals__
        if id(names) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(names))
        return self.rewrite()(*args, **kwargs)

    executor.__call__, function.__call__ = begin, device_function
    try:
        yield
    finally:
        executor.__call__, function.__call__ = launch, call


@contextlib.contextmanager
def watching(watcher: Watcher, *, on_tensors: bool = True) -> Iterator[None]:
    """Let a watcher see and steer every launch inside.

    Args:
        watcher: What to tell.
        on_tensors: Whether the operands have memory; else each is replaced by what `Watcher.launch` put into its
            arguments.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    plain = {
        name: getattr(builder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }
    call, operands, restore = executor.__call__, executor._init_args_hst, executor._restore_args_dev

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        (size,) = self.grid
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        programs = watcher.launch(self.fn.__name__, named, size)
        state = interpreter.interpreter_builder

        def run(body: Callable[[], None]) -> None:
            state.set_grid_dim(size, 1, 1)
            watcher.run(programs, body, lambda program: state.set_grid_idx(program, 0, 0))

        self.grid, self.fn = (1,), _Programs(self.fn, run)
        known = {name: value for name, value in named.items() if name in self.arg_names}
        call(self, **(known if not on_tensors else named))

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        kind = ptrs.get_element_ty()
        values = watcher.load(ptrs.data[mask.data], kind.primitive_bitwidth // 8)
        if values is None:
            return plain["create_masked_load"](self, ptrs, mask, other, *rest)
        dtype = interpreter._get_np_dtype(kind)
        result = np.zeros(ptrs.data.shape, dtype) if other is None else other.data.astype(dtype).copy()
        result[mask.data] = values
        return interpreter.TensorHandle(result, kind)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if watcher.store(ptrs.data[mask.data], ptrs.get_element_ty().primitive_bitwidth // 8):
            return None
        return plain["create_masked_store"](self, ptrs, value, mask, *rest)

    def atomic(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        ordered = "ACQUIRE_RELEASE" in str(sem) and "GPU" in str(scope)
        values = watcher.atomic(ptr.data[mask.data], ordered)
        if values is None:
            return plain["create_atomic_rmw"](self, operation, ptr, value, mask, sem, scope)
        result = value.data.copy()
        result[mask.data] = values
        return interpreter.TensorHandle(result, value.dtype.scalar)

    try:
        executor.__call__ = launch
        builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
        builder.create_atomic_rmw = atomic
        if not on_tensors:
            executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
            executor._restore_args_dev = lambda self, *args: None
        with np.errstate(all="ignore"), patching_once():
            yield
    finally:
        executor.__call__, executor._init_args_hst, executor._restore_args_dev = call, operands, restore
        for name, function in plain.items():
            setattr(builder, name, function)
