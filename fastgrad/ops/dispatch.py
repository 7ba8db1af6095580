"""Choose the implementation that runs: Triton on a GPU, plain torch elsewhere, or what the caller asks for.

The eager form is called itself, not as an operator: compilers fuse it, and exported files carry no custom operator.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgrad._torch import is_traced, is_transformed
from fastgrad.checks import KERNEL_DTYPES, one_of

_T = TypeVar("_T")

IMPLEMENTATIONS = ("auto", "triton", "eager")


def _found(name: str) -> bool:
    """Whether a module can be found, without importing it; a broken or blocked one cannot."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


TRITON_INSTALLED, KERNELS_FOUND = _found("triton"), _found("fastgrad.kernels")


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, which serves tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton cannot serve a tensor of this device and dtype, or None if it can."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels compute in float32, and the dtype was {str(dtype).removeprefix('torch.')}"
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if not KERNELS_FOUND:
        return "fastgrad/kernels is no folder, as in a checkout without symbolic links"
    if device.type == "cuda":
        # Triton does not use the matrix units of earlier GPUs. AMD's major versions are 9 or more.
        old = torch.cuda.is_available() and torch.cuda.get_device_properties(device).major < 8
        return "the kernels need compute capability 8.0" if old else None
    if device.type == "cpu":
        return None if interpreting() else "the device was cpu, where kernels only run with TRITON_INTERPRET=1"
    return f"the device was {device.type}, and kernels run on cuda (NVIDIA and AMD)"


def choose(impl: str, tensor: torch.Tensor) -> str:
    """Resolve ``impl`` to ``"triton"`` or ``"eager"`` for ``tensor``; ValueError if it is unknown or cannot run."""
    if impl == "eager" or (impl == "auto" and (tensor.device.type != "cuda" or torch.compiler.is_exporting())):
        return "eager"
    one_of("impl", impl, IMPLEMENTATIONS)
    # Recorded graphs become files, which run without this package; torch.func cannot differentiate our operators.
    alone = not torch.compiler.is_compiling() and (is_transformed() or (is_traced() and not opaque_ops.get()))
    if impl == "auto" and alone:
        return "eager"
    refusal = triton_refusal(tensor.device, tensor.dtype)
    if refusal and impl == "triton":
        raise ValueError(f"impl must be 'auto' or 'eager' here: it was 'triton', but {refusal}")
    return "eager" if refusal else "triton"


@contextlib.contextmanager
def bind_contextvar(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Give ``variable`` a value inside the context."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


#: Whether a graph that is recorded runs in this process: then our operators stay whole, as its nodes.
opaque_ops: ContextVar[bool] = ContextVar("fastgrad_opaque", default=False)
#: The ``impl`` that layer rules hand to operators; bound where rules run: backward passes have other threads.
implementation: ContextVar[str] = ContextVar("fastgrad_impl", default="auto")


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Suspend autocast, which is for the network: norms are summed in full precision in any context of the caller."""
    reduced = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if reduced else contextlib.nullcontext()


def launcher(module: str, name: str) -> Callable[..., Any]:
    """Return a function of ``fastgrad.ops.triton``, imported when called, on the device of its first argument."""

    def launch(first: Tensor, *rest: Any) -> Any:
        function = getattr(importlib.import_module(f"fastgrad.ops.triton.{module}"), name)
        with torch.cuda.device(first.device) if first.device.type == "cuda" else contextlib.nullcontext():
            return function(first, *rest)

    return launch


def operator(name: str, eager: Callable[..., _T], fake: Callable[..., _T]) -> Callable[..., _T]:
    """Define an operator with the signature and the derivative of ``eager``, which the backward pass runs again.

    ``name`` is also the name of its launcher in `fastgrad.ops.triton.last_layer`; ``fake`` returns results without
    values. Return ``function(*arguments, impl)``, which calls ``eager`` itself or the operator, as `choose` says for
    the first argument.
    """
    kernel, qualified = launcher("last_layer", name), f"fastgrad::{name}"

    def chosen(first: Tensor, *arguments: Any) -> Any:
        return (eager if triton_refusal(first.device, first.dtype) else kernel)(first, *arguments)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted, again = ctx.needs_input_grad[: len(ctx.others)], torch.is_grad_enabled()
        inputs = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        with torch.enable_grad(), full_precision(inputs[0].device):
            # One argument may depend on another, or be the same tensor, so the derivative is taken by views of each.
            inputs = [x.view_as(x) if want else x for x, want in zip(inputs, wanted, strict=True)]
            sources = [x for x, want in zip(inputs, wanted, strict=True) if want]
            outputs: Any = eager(*inputs)
            gradients = iter(torch.autograd.grad(outputs, sources, grads, create_graph=again, allow_unused=True))
        return tuple(next(gradients) if want else None for want in wanted)

    torch.library.define(qualified, torch.library.infer_schema(eager, mutates_args=()))
    torch.library.register_fake(qualified, fake)
    torch.library.impl(qualified, "CompositeExplicitAutograd", chosen)
    torch.library.register_autograd(qualified, backward, setup_context=setup)
    overload = getattr(torch.ops.fastgrad, name).default

    def function(*arguments: Any) -> _T:
        *inputs, impl = arguments
        run: Callable[..., _T] = overload if choose(impl, inputs[0]) == "triton" else eager
        if not torch.is_autocast_enabled(inputs[0].device.type):
            return run(*inputs)
        with full_precision(inputs[0].device):
            return run(*inputs)

    return function
