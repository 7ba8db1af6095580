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

from fastgrad._torch import is_mapped, is_readable, is_traced, is_transformed
from fastgrad.checks import KERNEL_DTYPES, one_of
from fastgrad.ops.tune import KNOWN_ARCHITECTURES, Architecture

_T = TypeVar("_T")

IMPLEMENTATIONS = ("auto", "triton", "eager")
#: Major compute capabilities of the NVIDIA GPUs that the kernels are compiled for in every report, and the least.
_MAJOR = {arch.version // 10 for arch in KNOWN_ARCHITECTURES.values() if arch.backend == "cuda"}
_LEAST = min(arch.version for arch in KNOWN_ARCHITECTURES.values() if arch.backend == "cuda")


def _found(name: str) -> bool:
    """Whether a module can be found, without importing it. A broken or blocked one cannot."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


TRITON_INSTALLED, KERNELS_FOUND = _found("triton"), _found("fastgrad.kernels")


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, which serves tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _gpu(index: int | None) -> Architecture | None:
    """Return what kernels are compiled for on a GPU, or None if there is no GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    processors = int(getattr(properties, "multi_processor_count", 1))
    if torch.version.hip:
        name = str(properties.gcnArchName).split(":")[0]
        digits = "".join(c for c in name if c.isdigit())
        shared = KNOWN_ARCHITECTURES[name].shared_memory if name in KNOWN_ARCHITECTURES else 64 << 10
        return Architecture("hip", int(digits or 0), processors, shared)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 99 << 10))
    return Architecture("cuda", 10 * properties.major + properties.minor, processors, shared)


#: The answers of `_gpu` by device: asking takes longer than a launch.
_gpus: dict[int | None, Architecture] = {}


def gpu(index: int | None) -> Architecture | None:
    """Return what kernels are compiled for on a GPU, or None if there is none; a device is asked once."""
    if torch.compiler.is_compiling():
        return _gpu(index)
    if index not in _gpus:
        found = _gpu(index)
        if found is None:
            return None
        _gpus[index] = found
    return _gpus[index]


def _gpu_refusal(index: int | None) -> str | None:
    """Return why a GPU cannot run the kernels, or None if it can or there is none."""
    arch = gpu(index)
    if arch is None or arch.name in KNOWN_ARCHITECTURES:
        return None
    if arch.backend == "cuda" and arch.version >= _LEAST and arch.version // 10 in _MAJOR:
        return None
    return f"the device was {arch.name}, and kernels are compiled for {', '.join(KNOWN_ARCHITECTURES)}"


def product_refusal(device: torch.device) -> str | None:
    """Return why a device cannot run the kernels that multiply matrices, or None if it can."""
    arch = gpu(device.index) if device.type == "cuda" else None
    if arch is None or arch.multiplies:
        return None
    able = ", ".join(name for name, known in KNOWN_ARCHITECTURES.items() if known.multiplies)
    return f"the device was {arch.name}, and this kernel multiplies on the matrix units of {able}"


def triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton cannot serve a tensor of this device and dtype, or None if it can."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels compute in float32, and the dtype was {str(dtype).removeprefix('torch.')}"
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if not KERNELS_FOUND:
        return "fastgrad/kernels is no folder, as in a checkout without symbolic links"
    if device.type == "cuda":
        return _gpu_refusal(device.index)
    if device.type == "cpu":
        return None if interpreting() else "the device was cpu, where kernels only run with TRITON_INTERPRET=1"
    return f"the device was {device.type}, and kernels run on cuda"


def choose(impl: str, tensor: torch.Tensor, missing: str | None = None, mapped: bool = False) -> str:
    """Resolve ``impl`` to ``"triton"`` or ``"eager"`` for ``tensor``; ValueError if it is unknown or cannot run.

    ``missing`` says why there is no kernel for the other arguments, if there is none, and ``mapped`` whether ``vmap``
    has a rule for it.
    """
    if impl == "eager" or (impl == "auto" and (tensor.device.type != "cuda" or torch.compiler.is_exporting())):
        return "eager"
    one_of("impl", impl, IMPLEMENTATIONS)
    transformed = is_transformed() and not (mapped and is_mapped())
    # A recorded graph becomes a file, which runs without this package; torch.func cannot differentiate our operators.
    if impl == "auto" and not torch.compiler.is_compiling() and (transformed or is_traced()):
        return "eager"
    if transformed and mapped:
        missing = "torch.func cannot differentiate the kernel"
    refusal = missing or triton_refusal(tensor.device, tensor.dtype)
    if refusal and impl == "triton":
        raise ValueError(f"impl must be 'auto' or 'eager' here: it was 'triton', but {refusal}")
    return "eager" if refusal else "triton"


#: The ``impl`` that formulas hand to operators.
implementation: ContextVar[str] = ContextVar("fastgrad_impl", default="auto")


@contextlib.contextmanager
def computing_with(impl: str) -> Iterator[None]:
    """Have formulas hand ``impl`` to operators inside."""
    token = implementation.set(impl)
    try:
        yield
    finally:
        implementation.reset(token)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Suspend the caller's autocast, which is meant for the network: norms are summed in full precision."""
    reduced = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if reduced else contextlib.nullcontext()


def launcher(module: str, name: str) -> Callable[..., Any]:
    """Return a function of ``fastgrad.ops.triton``, imported when called, on the device of its first argument."""
    found: list[Callable[..., Any]] = []

    def launch(first: Tensor, *rest: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(f"fastgrad.ops.triton.{module}"), name))
        if first.device.type != "cuda":
            return found[0](first, *rest)
        here = first.device.index == torch.cuda.current_device()
        try:
            with contextlib.nullcontext() if here else torch.cuda.device(first.device):
                return found[0](first, *rest)
        except RuntimeError as error:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{name} must be called once on tensors of these shapes before a CUDA graph is captured: its "
                    "kernels were not compiled"
                ) from error
            raise

    return launch


def operator(
    name: str, eager: Callable[..., _T], fake: Callable[..., _T],
    missing: Callable[..., str | None] = lambda *arguments: None,
) -> Callable[..., _T]:  # fmt: skip
    """Define an operator with the signature and the derivative of ``eager``, which the backward pass runs again.

    Its launcher in `fastgrad.ops.triton.contrasts` has the same ``name``. Tensors have their samples along dimension 0,
    those that ``vmap`` maps over included. From the operator's arguments, ``fake`` returns results without values, and
    ``missing`` why they have no kernel, if so. Return ``function(*arguments, impl)``, which calls ``eager`` itself or
    the operator, whichever `choose` names.
    """
    kernel, qualified = launcher("contrasts", name), f"fastgrad::{name}"

    def chosen(first: Tensor, *arguments: Any) -> Any:
        plain = missing(first, *arguments) or triton_refusal(first.device, first.dtype)
        return (eager if plain else kernel)(first, *arguments)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted, again = ctx.needs_input_grad[: len(ctx.others)], torch.is_grad_enabled()
        inputs = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        with torch.enable_grad(), full_precision(inputs[0].device):
            # One argument may depend on another, or be the same tensor, so each is differentiated through its own view.
            inputs = [x.view_as(x) if want else x for x, want in zip(inputs, wanted, strict=True)]
            sources = [x for x, want in zip(inputs, wanted, strict=True) if want]
            outputs: Any = eager(*inputs)
            gradients = iter(torch.autograd.grad(outputs, sources, grads, create_graph=again, allow_unused=True))
        return tuple(next(gradients) if want else None for want in wanted)

    def vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        def flat(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        inputs = [flat(x, dim) for x, dim in zip(arguments, dims, strict=True)]
        result = overload(*inputs)
        return result.unflatten(0, (info.batch_size, len(result) // info.batch_size)), 0

    torch.library.define(qualified, torch.library.infer_schema(eager, mutates_args=()))
    torch.library.register_fake(qualified, fake)
    torch.library.impl(qualified, "CompositeExplicitAutograd", chosen)
    torch.library.register_autograd(qualified, backward, setup_context=setup)
    torch.library.register_vmap(qualified, vmap)
    overload = getattr(torch.ops.fastgrad, name).default

    def function(*arguments: Any) -> _T:
        *inputs, impl = arguments
        run: Callable[..., _T] = eager
        if choose(impl, inputs[0], missing(*inputs), mapped=True) == "triton":
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            recorded = not is_readable(*tensors) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
            # Nothing records the operator here, and PyTorch's dispatcher would take as long as the launch.
            run = overload if recorded else kernel
        if not torch.is_autocast_enabled(inputs[0].device.type):
            return run(*inputs)
        with full_precision(inputs[0].device):
            return run(*inputs)

    return function
