"""Every private name of PyTorch that the package uses, and nothing else.

A private name may change with any release. Gathered here, such a change is mended in one file. Each entry says why
it is needed and what happens without it. All were tried with the test suite on PyTorch 2.8.0, 2.13.0 and 2.15.0
(the workflow ``build`` repeats the oldest and the newest); an entry names versions only where they differ.

Names of ATen's operators (``torch.ops.aten``) are no private names: exported programs store them. ``nn.Module``'s own
tables (``_parameters``, ``_forward_hooks``), which pickled models contain, are read in `fastgrad.engine.shadow`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules import batchnorm, conv, instancenorm
from torch.utils import _python_dispatch, _pytree

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

#: Nested inputs and outputs, taken apart as PyTorch's own transforms do it, classes that libraries registered with
#: them included (the outputs of Hugging Face's models). Without, such classes would be leaves and their tensors lost.
pytree = _pytree

#: Raises RuntimeError unless a condition holds; inside operators, where compilers understand it as a fact about
#: shapes. Without, an ``if`` on a symbolic size would fix the size.
check: Callable[[bool, Callable[[], str]], None] = torch._check

#: Raises an error unless a condition on the device holds, when the device comes to it. Without, a check of a target's
#: values would wait for the device and break a compiled graph.
check_later = torch._assert_async

#: What convolutions, transposed ones, and normalisations of all dimensions have in common, lazy ones and subclasses
#: included. Without, every rule would list the classes of one to three dimensions, and miss what is derived otherwise.
ConvNd = conv._ConvNd
ConvTransposeNd = conv._ConvTransposeNd
NormBase = batchnorm._NormBase
BatchNorm = batchnorm._BatchNorm
InstanceNorm = instancenorm._InstanceNorm


#: Sees every operation while it lasts. Without, what a forward pass costs up to a layer would have to be measured.
DispatchMode = _python_dispatch.TorchDispatchMode


def padding_pairs(module: ConvNd) -> list[int]:
    """What a convolution adds at both ends of each axis, last axis first, as ``torch.nn.functional.pad`` takes it.

    Without, it would have to be derived from ``padding``, ``dilation`` and the rule for ``"same"``.
    """
    return list(module._reversed_padding_repeated_twice)


def original(module: nn.Module) -> nn.Module:
    """The module that was given to ``torch.compile``, or the module itself.

    Without, an extraction would copy the compiled wrapper, whose ``forward`` knows nothing of the copy's hooks.
    """
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def unviewed(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of its own where ``tensor`` is a view of a whole one, as ``nn.Linear`` returns it.

    Without, marking it as changed in place has autograd go through the tensor that it views: three copies of the
    gradient in every backward pass.
    """
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or not tensor.is_contiguous():
        return tensor
    own: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return own


def without_modes() -> contextlib.AbstractContextManager[None]:
    """While it lasts, operations pass by what watches a model's own.

    Without, every look of a hook at a tensor's shape would cost as much as a step of the model.
    """
    context: contextlib.AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def saves_elsewhere() -> bool:
    """Whether tensors that autograd saves go through hooks, as those of a checkpoint, which computes them again.

    Without, several gradients at once would meet functions of autograd in the middle of a backward pass.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def storage_key(tensor: Tensor) -> int:
    """Tells apart the memory of tensors, fake ones included, which have no address.

    Without, views would count as memory of their own, and the choice between a loop and a batch would be off.
    """
    return int(tensor.untyped_storage()._cdata)


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a shape and no values, as while a graph is recorded.

    Without, a look at values would fail while a graph is recorded.
    """
    return isinstance(tensor, FakeTensor)


def is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` runs under ``torch.func.vmap``, as the gradients of several signals do.

    Without, rules would take the fast forms for one signal, which ``vmap`` cannot follow.
    """
    return bool(_functorch.is_batchedtensor(tensor))


def is_traced() -> bool:
    """Whether a compiler will see the operations.

    Without, code that is best in pieces would be recorded piece by piece.
    """
    return torch.compiler.is_compiling() or _python_dispatch.is_in_torch_dispatch_mode()


def is_readable(*tensors: Tensor) -> bool:
    """Whether Python may look at values: not while tracing or under a functorch transform.

    Without, choosing an algorithm by the values would fail there, or fix the choice in a graph.
    """
    return not (is_traced() or any(is_fake(t) or _functorch.is_functorch_wrapped_tensor(t) for t in tensors))


def is_exporting() -> bool:
    """Whether ``torch.export`` is recording, which would keep a composite operator as it is.

    Not while the compiler's frontend reads the code, as in export's strict mode: it cannot follow the cost model,
    and keeps the operators until ``run_decompositions``. Without, an exported program would call operators that only
    this package has.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def outside_of_compilation(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """``function`` for a call that ``torch.compile`` leaves a graph for, instead of following it.

    The public ``torch.compiler.disable`` imports the compiler, which takes seconds. Without the look whether it is
    there, the first call of every extraction would wait for it.
    """
    if "torch._dynamo" not in sys.modules:
        return function
    left: Callable[_Arguments, _Result] = torch.compiler.disable(function)
    return left


def attend_alike(module: nn.Module) -> None:
    """Let a module of PyTorch's attention compute as it does with gradients. Only a private copy is to be changed.

    Its parameters must be copies, too.

    Without, in evaluation mode and without gradients, it takes a path of its own
    (``torch._transformer_encoder_layer_fwd``) that rounds otherwise and that tracers cannot follow: the features
    would differ from those of an exported graph. No switch leaves that path for one model alone.
    """
    if type(module).forward in (nn.MultiheadAttention.forward, nn.TransformerEncoderLayer.forward):
        # Of the modules' own code this switches the path and the dropout of attention weights, nothing else.
        module.training = True
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
            # It multiplies transposed inputs. Where the weight needs no gradient, PyTorch takes that for a batch of
            # products, one a position, each with a copy of the weight: many times slower, with or without a graph.
            for name, value in module._parameters.items():
                if name.endswith("proj_weight") and value is not None:
                    value.requires_grad_()


def flat_graph(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    carries: Sequence[bool],
    *,
    functional: bool = False,
) -> torch.fx.GraphModule:
    """Record every operation of ``function(*tensors)``, those of `torch.autograd.grad` among them, as one flat graph.

    Without, there is no exported file and no compiled extraction: ``torch.export`` and ``torch.compile`` do not follow
    a backward pass inside of ``forward``.

    Args:
        function: What to record; it runs once, on fake tensors.
        tensors: Its inputs.
        carries: For each input, whether its dimension 0 is the batch, whose size becomes a symbol. It must be 2 at
            least: sizes 0 and 1 are special to the tracer.
        functional: Whether operations that write in place become ones that do not, as a loop's body needs them.

    Raises:
        ValueError: What runs depends on values, which a graph cannot follow.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        GuardOnDataDependentSymNode,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(tensor: Tensor, batch: bool) -> Tensor:
        sizes = [
            DimDynamic.DYNAMIC if batch and axis == 0 else DimDynamic.STATIC for axis in range(tensor.dim())
        ]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context)

    inputs = [fake(tensor, batch) for tensor, batch in zip(tensors, carries, strict=True)]
    # Some operators compute shapes in C++, where a symbolic size would become a number; the dispatcher takes the
    # Python form. "real" here means: take the tensors as they are, which are fake ones already.
    try:
        with mode, enable_python_dispatcher():
            graph = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)
            if functional:
                pure = torch.func.functionalize(graph)
                graph = make_fx(pure, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)
    except (GuardOnDataDependentSymNode, DataDependentOutputException) as error:
        raise ValueError(
            "model must not choose what it computes by the values of its inputs where a graph of it is recorded; "
            f"PyTorch says: {str(error).splitlines()[0]}"
        ) from error
    return graph


def while_loop(
    condition: Callable[..., Tensor], body: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A loop that exported programs keep as one: ``while condition(*state): state = body(*state)``.

    Without, a file could only work through a whole batch at once, which on a CPU takes twice as long where a large
    input's gradients are asked for. 2.6 and 2.7 refuse to export one whose body has a backward pass: their verifier
    stumbles over results that do not exist, as the bias's gradient of a convolution without bias.
    """
    from torch._higher_order_ops.while_loop import while_loop as loop

    return tuple(loop(condition, body, state))


def require_cpp_compiler(what: str) -> None:
    """Raise RuntimeError with a plain message unless a C++ compiler is installed, which ``what`` needs.

    Without, the compilation itself would fail, with a message that names neither the cause nor the remedy.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise RuntimeError(
            f"{what} compiles native code and found no C++ compiler; install one (Debian and Ubuntu: "
            "apt-get install g++) or name it in the environment variable CXX"
        ) from error


def compile_package(program: torch.export.ExportedProgram, file: Path, *, keep_layout: bool) -> None:
    """Compile ``program`` to native code in a ``.pt2``, with AOTInductor: the only way there is.

    Args:
        program: What to compile.
        file: Where to write.
        keep_layout: Leave convolutions in the layout they have, instead of channels last.
    """
    import torch._inductor

    options: dict[str, Any] = {
        # Otherwise the number of this machine's cores would be compiled in.
        "cpp.dynamic_threads": True,
        # Pays off after many compilations; this is one, of two files.
        "cpp_cache_precompile_headers": False,
        # Rounds as the CPU's own operators do (`fastgrad.deploy.file.graph` says where that matters).
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    if keep_layout:
        options["layout_optimization"] = False
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)


def load_package(file: Path) -> Callable[..., Any]:
    """The function in a ``.pt2`` that `compile_package` wrote; PyTorch has no other name for it."""
    import torch._inductor

    return torch._inductor.aoti_load_package(str(file))


@contextlib.contextmanager
def keeping(*operators: torch._ops.OpOverload) -> Iterator[None]:
    """While it lasts, compilations call PyTorch's kernels of these operators instead of writing their own.

    Without, compiled code rounds otherwise than the live model, and a detector magnifies the difference.
    """
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
