"""Every private name of PyTorch that the package uses: what a release changes is fixed here.

Each entry says what happens without it. All were tried on PyTorch 2.8.0, 2.13.0 and 2.15.0. ATen's operators
(``torch.ops.aten``) and ``nn.Module``'s tables are not private: exported programs and pickled models hold them.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules import batchnorm, conv, instancenorm
from torch.nn.utils import parametrize
from torch.utils import _python_dispatch, _pytree

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

#: Instruction sets of PyTorch's code for x86, each with those before it, and what compilers call them.
X86 = {"DEFAULT": "x86-64", "AVX2": "haswell", "AVX512": "skylake-avx512"}

#: Nested inputs and outputs. Without, classes that libraries registered with it (outputs of Hugging Face's models)
#: would be leaves and their tensors lost.
pytree = _pytree

#: Raises an error on the device. Without, a check of a target's values would wait for it and break a compiled graph.
check_later = torch._assert_async

#: Base classes of one to three dimensions. Without, every rule would list each, and miss what is derived otherwise.
ConvNd = conv._ConvNd
ConvTransposeNd = conv._ConvTransposeNd
NormBase = batchnorm._NormBase
BatchNorm = batchnorm._BatchNorm
InstanceNorm = instancenorm._InstanceNorm

#: Sees every operation. Without, what a forward pass costs up to a layer would have to be measured.
DispatchMode = _python_dispatch.TorchDispatchMode

#: Passes by what watches a model's operations. Without, every look of a hook at a shape would cost a step.
without_modes: Callable[[], contextlib.AbstractContextManager[None]] = torch._C.DisableTorchFunction

#: The number of this thread's next operation in a graph. Without, what a call did would be unknown among other work.
next_number: Callable[[], int] = torch._C._autograd._get_sequence_nr

#: Whether a tensor runs under ``torch.func.vmap``. Without, rules would take forms that it cannot follow.
is_batched: Callable[[Tensor], bool] = _functorch.is_batchedtensor

#: Whether one of torch.func's transforms wraps a tensor. Without, asking where its numbers lie would raise.
is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor


class _Kept(dict[Any, Any]):
    """What ``parametrize.cached`` keeps; that of a pass under way in this thread is in a dict of its own."""

    def get(self, key: Any, default: Any = None, /) -> Any:
        return super().get(key, default) if _pass.kept is None else _pass.kept.get(key, default)

    def __setitem__(self, key: Any, value: Any, /) -> None:
        if _pass.kept is None:
            super().__setitem__(key, value)
        else:
            _pass.kept[key] = value


class _Pass(threading.local):
    kept: dict[Any, Any] | None = None


_pass = _Pass()


@contextlib.contextmanager
def own_parametrizations() -> Iterator[None]:
    """While it lasts, ``parametrize.cached`` keeps weights of this thread apart from those kept before.

    It keeps them by the module that was parametrized. Without, one copy of a model would take the weights of another.
    """
    # Other threads keep theirs meanwhile, and may end their time.
    if type(parametrize._cache) is not _Kept:
        parametrize._cache = _Kept(parametrize._cache)
    before, _pass.kept = _pass.kept, {}
    try:
        yield
    finally:
        _pass.kept = before


def padding_pairs(module: ConvNd) -> list[int]:
    """What a convolution that pads with other than zeros adds at both ends of each axis, last axis first."""
    return list(module._reversed_padding_repeated_twice)


def original(module: nn.Module) -> nn.Module:
    """The module that was given to ``torch.compile``. Otherwise the copied wrapper would skip hooks."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def drop_view_base(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of its own where ``tensor`` is a view of a whole one, as ``nn.Linear`` returns it.

    Without, autograd goes through the tensor that it views: three copies of the gradient in every backward pass.
    """
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or not tensor.is_contiguous():
        return tensor
    own: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return own


def number_of(node: Any) -> int:
    """The number of an operation in a graph, see `next_number`."""
    return int(node._sequence_nr())


def saves_elsewhere() -> bool:
    """Whether saved tensors go through hooks. Without, batched gradients would meet a checkpoint's recomputation."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def storage_key(tensor: Tensor) -> int:
    """Identifies the memory of tensors, fake ones included. Otherwise views would count as memory of their own."""
    return int(tensor.untyped_storage()._cdata)


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no values, as while a graph is recorded. Without, a look at them would fail."""
    return isinstance(tensor, FakeTensor)


def is_transformed() -> bool:
    """Whether ``torch.func`` transforms what runs. Without, tensors of an inner level would be told to need gradients.

    A function transformed has no graph that probes could be part of.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """What ``torch.func`` has wrapped, of all samples together. Without, a look at values would fail under vmap."""
    while not torch.compiler.is_compiling() and is_wrapped(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


_mapping = 0
_mapping_lock = threading.Lock()


def vmap(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``torch.func.vmap``. Without, it would warn of operators that it calls for one sample after the other.

    The switch is the process's; filters of warnings, which are as well, would show what another thread put back.
    """

    def mapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        _count_mapping(1)
        try:
            result: _Result = torch.func.vmap(function)(*args, **kwargs)
        finally:
            _count_mapping(-1)
        return result

    return mapped


def _count_mapping(step: int) -> None:
    global _mapping
    with _mapping_lock:
        _mapping += step
        _functorch._set_vmap_fallback_warning_enabled(not _mapping)  # type: ignore[attr-defined]


def is_traced() -> bool:
    """Whether a compiler will see the operations. Without, work in pieces would be recorded piece by piece."""
    return torch.compiler.is_compiling() or _python_dispatch.is_in_torch_dispatch_mode()


def is_readable(*tensors: Tensor) -> bool:
    """Whether Python may look at values. Without, a choice by values would fail in a trace, or be fixed in a graph."""
    return not (is_traced() or any(is_fake(t) or is_wrapped(t) for t in tensors))


def outside_of_compilation(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``torch.compiler.disable(function)``. Without the look at modules, the first call would import the compiler."""
    if "torch._dynamo" not in sys.modules:
        return function
    left: Callable[_Arguments, _Result] = torch.compiler.disable(function)
    return left


def disable_mha_fastpath(module: nn.Module) -> None:
    """Let a private copy of PyTorch's attention, with copied parameters, compute as it does with gradients.

    Without, it takes a path (``torch._transformer_encoder_layer_fwd``) that rounds otherwise and that tracers cannot
    follow. No switch leaves that path for one model alone.
    """
    if type(module).forward in (nn.MultiheadAttention.forward, nn.TransformerEncoderLayer.forward):
        # Of the modules' own code this switches the path and the dropout of attention weights, nothing else.
        module.training = True
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
            # It multiplies transposed inputs. Where the weight needs no gradient, PyTorch takes that for a batch of
            # products, one a position, each with a copy of the weight: many times slower, with or without a graph.
            for name, value in module._parameters.items():
                if name.endswith("proj_weight") and value is not None and not is_transformed():
                    value.requires_grad_()


def flat_graph(
    function: Callable[..., Any], inputs: Any, batch: int | None, *, functional: bool = False
) -> torch.fx.GraphModule:
    """Record every operation of ``function(*inputs)``, backward passes among them, as one flat graph of their tensors.

    Without, there is no exported file and no compiled extraction: ``torch.export`` and ``torch.compile`` do not follow
    a backward pass inside of ``forward``.

    The function runs once, on fake tensors; ValueError if what it runs depends on values. Tensors whose dimension 0 is
    ``batch``, 2 at least, carry the batch, whose size becomes a symbol; None records constant sizes. ``functional``
    replaces operations that write in place, which a loop's body must not. The graph takes the tensors positionally.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        sizes = [DimDynamic.STATIC] * tensor.dim()
        if tensor.shape[:1] == (batch,):
            sizes[0] = DimDynamic.DYNAMIC
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context)

    def flat(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return function(*pytree.tree_map_only(Tensor, lambda _: next(given), inputs))

    tensors = [fake(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    # Some operators compute shapes in C++, where a symbolic size would become a number; the dispatcher takes the
    # Python form. "real" here means: take the tensors as they are, which are fake ones already.
    try:
        with mode, enable_python_dispatcher():
            graph = make_fx(flat, tracing_mode="real", _allow_non_fake_inputs=True)(*tensors)
            if functional:
                pure = torch.func.functionalize(graph)
                graph = make_fx(pure, tracing_mode="real", _allow_non_fake_inputs=True)(*tensors)
    except RuntimeError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith("fastgrad."):
            raise  # it says itself what has no form for every batch size
        raise ValueError(
            "model must not choose what it computes by the values of its inputs, hand them to NumPy, or use an "
            "operation that PyTorch has for values alone, where a graph of it is recorded; PyTorch says: "
            + str(error).partition("\n")[0]
        ) from error
    return graph


def while_loop(
    condition: Callable[..., Tensor], body: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A loop that exported programs keep: ``while condition(*state): state = body(*state)``.

    Without, a file could only work through a whole batch at once, which takes twice as long for large gradients.
    """
    from torch._higher_order_ops.while_loop import while_loop as loop

    return tuple(loop(condition, body, state))


def require_cpp_compiler(what: str) -> None:
    """Raise RuntimeError unless a C++ compiler is installed. Without, the error would name neither cause nor remedy."""
    if sys.platform == "win32" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        raise RuntimeError(f"{what} compiles native code, on Windows from PyTorch 2.9 on; it was {torch.__version__}")
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise RuntimeError(
            f"{what} compiles native code and found no C++ compiler; install one (Debian and Ubuntu: "
            "apt-get install g++; macOS: xcode-select --install; Windows: Visual Studio's build tools) or name "
            "it in the environment variable CXX"
        ) from error


def compile_package(program: torch.export.ExportedProgram, file: Path, *, keep_layout: bool) -> None:
    """Compile ``program`` to native code in a ``.pt2``; ``keep_layout`` leaves convolutions in the layout they have."""
    import torch._inductor.config

    options: dict[str, Any] = {
        # Otherwise the number of this machine's cores would be compiled in.
        "cpp.dynamic_threads": True,
        # Pays off after many compilations; this is one, of two files.
        "cpp_cache_precompile_headers": False,
        # Rounds as the CPU's own operators do: a last place that takes an activation across the kink of a ReLU opens or
        # closes a path of the backward pass.
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    if keep_layout:
        options["layout_optimization"] = False
    # Otherwise it would be all the instructions of this very machine. Early PyTorch has no such option.
    if platform.machine() in ("x86_64", "AMD64") and getattr(torch._inductor.config.cpp, "march", "") is None:
        options["cpp.march"] = X86.get(torch.backends.cpu.get_cpu_capability())
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)


def load_package(file: Path) -> Callable[..., Any]:
    """The function in a ``.pt2`` that `compile_package` wrote."""
    import torch._inductor

    return torch._inductor.aoti_load_package(str(file))


@contextlib.contextmanager
def keeping(*operators: torch._ops.OpOverload) -> Iterator[None]:
    """Have compilations call PyTorch's kernels of these operators. Without, compiled code rounds otherwise."""
    from torch._inductor import decomposition

    tables = [decomposition.decompositions, decomposition.fast_random_decomps()]
    kept = [(table, name, table.pop(name)) for table in tables for name in operators if name in table]
    # It warns that such a call is found by name.
    log = logging.getLogger("torch._inductor.ir")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        for table, name, function in kept:
            table[name] = function
