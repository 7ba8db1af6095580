"""Catch the launches that a call makes and compile each for a GPU that need not be there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise ImportError(
        "kernels are compiled in a process without TRITON_INTERPRET=1, which would interpret them"
    )

# Triton 3.4 asks for ROCm's linker, later ones bring their own. What is read here is the assembly, which comes before.
os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpu.compile_cases import DTYPES, as_if_on
from fastgrad.ops import tune

TARGETS = {
    name: GPUTarget("hip", name, 64) if arch.backend == "hip" else GPUTarget("cuda", arch.version, 32)
    for name, arch in tune.KNOWN_ARCHITECTURES.items()
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A caught launch: what the compiler needs to know of it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


@contextlib.contextmanager
def _catching(arch: str, caught: list[Launch]) -> Iterator[None]:
    """Collect launches instead of making them, as if the tensors were on a device of the given architecture."""
    jit = triton.runtime.jit.JITFunction
    saved = jit.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        caught.append(_describe(kernel, args, kwargs))

    jit.run = run
    try:
        with as_if_on(tune.KNOWN_ARCHITECTURES[arch]):
            yield
    finally:
        jit.run = saved


def _describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Specialise arguments as Triton's launcher does: 1 is a constant, multiples of 16 and fresh pointers are known."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {}
    for name, value in kwargs.items():
        (values if name in kernel.arg_names else options)[name] = value
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or (value is None) or (isinstance(value, int) and value == 1 and not plain):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not plain:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return Launch(kernel, signature, constants, attributes, options)


def launches(call: Callable[[], object], arch: str) -> list[Launch]:
    """The launches that a call makes on an architecture."""
    caught: list[Launch] = []
    with _catching(arch, caught):
        call()
    return caught


def compile_launch(one: Launch, arch: str) -> Any:
    """Compile a caught launch for an architecture."""
    source = ASTSource(one.kernel, one.signature, constexprs=one.constants, attrs=one.attributes)
    return triton.compile(source, target=TARGETS[arch], options=one.options)
