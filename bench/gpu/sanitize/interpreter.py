"""Watch what the programs of a launch do to memory, and choose the order in which they run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("the sanitizer interprets kernels: TRITON_INTERPRET=1 must be set before Triton is imported")

from triton.runtime import interpreter


@contextlib.contextmanager
def patching_once() -> Iterator[None]:
    """Patch the language once a launch and module inside.

    The interpreter does so in every call of a device function, which takes half the time of a launch.
    """
    executor, function = interpreter.GridExecutor, interpreter.InterpretedFunction
    launch = executor.__call__
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

    with mock.patch.object(executor, "__call__", begin), mock.patch.object(function, "__call__", device_function):
        yield


@contextlib.contextmanager
def watching(watcher: Any) -> Iterator[None]:
    """Let a watcher see and steer every launch inside; operands are on the CPU, or what it puts in their place.

    Its ``launch`` may replace arguments, and returns the programs to run, in order. Its ``load`` and ``atomic`` return
    values to take instead of those in memory, or None; its ``store`` returns whether not to write.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    atomic, dim, index = builder.create_atomic_rmw, builder.set_grid_dim, builder.set_grid_idx

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
        values = watcher.load(ptrs.data[mask.data], kind.primitive_bitwidth // 8)
        if values is None:
            return load(self, ptrs, mask, other, *rest)
        dtype = interpreter._get_np_dtype(kind)
        result = np.zeros(ptrs.data.shape, dtype) if other is None else other.data.astype(dtype).copy()
        result[mask.data] = values
        return interpreter.TensorHandle(result, kind)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        skip = watcher.store(ptrs.data[mask.data], ptrs.get_element_ty().primitive_bitwidth // 8)
        return None if skip else store(self, ptrs, value, mask, *rest)

    def atomic_rmw(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        ordered = "ACQUIRE_RELEASE" in str(sem) and "GPU" in str(scope)
        width = ptr.get_element_ty().primitive_bitwidth // 8
        values = watcher.atomic(ptr.data[mask.data], width, ordered)
        if values is None:
            return atomic(self, operation, ptr, value, mask, sem, scope)
        result = value.data.copy()
        result[mask.data] = values
        return interpreter.TensorHandle(result, value.dtype.scalar)

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
