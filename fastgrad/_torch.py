"""Every private name of PyTorch that the package uses, so that a change in a release is fixed in one place.

Each entry says what would happen without it. All were tried on PyTorch 2.8.0, 2.13.0 and 2.15.0. ATen's operators
(``torch.ops.aten``) and ``nn.Module._parameters`` are not private: exported programs and pickled models contain them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules import batchnorm, conv, instancenorm, module
from torch.utils import _python_dispatch, _pytree, checkpoint

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

#: Instruction sets of PyTorch's x86 kernels, each including those before it, and their names in compilers.
X86 = {"DEFAULT": "x86-64", "AVX2": "haswell", "AVX512": "skylake-avx512"}

#: Flattens nested inputs and outputs. Without it, classes that libraries register with it, such as the outputs of
#: Hugging Face's models, would be leaves, and their tensors would be lost.
pytree = _pytree

#: Raises an error on the device. Without it, checking target values would wait for the device and break a graph.
check_later = torch._assert_async

#: Base classes for one to three dimensions. Without them, each layer would be listed, and other subclasses missed.
ConvNd = conv._ConvNd
BatchNorm = batchnorm._BatchNorm
InstanceNorm = instancenorm._InstanceNorm

#: Sees every operation. Without it, the cost of a forward pass would have to be timed instead of counted.
DispatchMode = _python_dispatch.TorchDispatchMode

#: Whether such a mode is active. If unknown, what a selective checkpoint stores would be written to.
in_dispatch_mode: Callable[[], bool] = _python_dispatch.is_in_torch_dispatch_mode

#: Turns off the mode that notes a model's functions. Without it, every shape that a hook reads would be noted too.
without_modes: Callable[[], contextlib.AbstractContextManager[None]] = torch._C.DisableTorchFunction

#: The sequence number of this thread's next autograd node. Without it, the nodes of one call could not be identified.
next_number: Callable[[], int] = torch._C._autograd._get_sequence_nr


def original(module: nn.Module) -> nn.Module:
    """Return the module inside a ``torch.compile`` wrapper. Without this, the copied wrapper would skip hooks."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def drop_view_base(tensor: Tensor) -> Tensor:
    """Return ``tensor`` without its base, on the same memory, if it views a whole tensor, as ``nn.Linear`` returns.

    Without this, autograd goes through the base tensor: three copies of the gradient in every backward pass.
    """
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or not tensor.is_contiguous():
        return tensor
    own: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return own


def number_of(node: Any) -> int:
    """Return the sequence number of an autograd node (see `next_number`)."""
    return int(node._sequence_nr())


@contextlib.contextmanager
def saving_plainly() -> Iterator[None]:
    """Keep the caller's hooks from saved tensors. Otherwise a checkpoint would count those that a trial saves."""
    autograd: Any = torch._C._autograd
    hooks = []
    while pair := autograd._top_saved_tensors_default_hooks(True):
        hooks.append(pair)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor is of a transform of ``torch.func`` that does not run in this thread."""
    if not _functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return int(_functorch.maybe_get_level(tensor)) > (_functorch.maybe_current_level() or 0)


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform is active. If unknown, tensors inside would get ``requires_grad_``.

    A transformed function has no autograd graph that probes could be part of. While ``torch.compile`` traces a call, it
    would mistake the check itself for a transform.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_mapped() -> bool:
    """Whether all active ``torch.func`` transforms are ``vmap``. If unknown, operators run as plain torch in it."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    return all(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor that ``torch.func`` wrapped, with all samples. Without it, reading values fails under vmap."""
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


#: Whether a tensor is a view for autograd. If unknown, FSDP would lose its hooks of what modules return under vmap.
is_view: Callable[[Tensor], bool] = Tensor._is_view

#: The levels of ``torch.func.vmap``: what a level is, which tensor has one, and the batch behind it. Without them, a
#: function's rule would have to be an autograd function with a batching rule, 100 microseconds a call.
functorch: Any = _functorch

#: The hooks through which saved tensors go, or None. If unknown, a checkpoint would compute again after vmap is over.
saved_tensor_hooks: Callable[[], Any] = functools.partial(torch._C._autograd._top_saved_tensors_default_hooks, False)


def hooks_above(hooks: Any) -> list[Any]:
    """Return the hooks of saved tensors that were pushed after ``hooks``, which may be None."""
    autograd: Any = torch._C._autograd
    found: list[Any] = []
    while (pair := autograd._top_saved_tensors_default_hooks(True)) and pair != hooks:
        found.insert(0, pair)
        autograd._pop_saved_tensors_default_hooks()
    for pack, unpack in found:
        autograd._push_saved_tensors_default_hooks(pack, unpack)
    return found


def checkpoint_of(hooks: Any) -> Any:
    """Return the checkpoint to which hooks of saved tensors belong, or None.

    Its ``recompute_fn`` is called in the backward pass. Without it, samples with a checkpoint would run one by one.
    """
    pack = hooks[0]
    names = getattr(getattr(pack, "__code__", None), "co_freevars", ())
    found = dict(zip(names, pack.__closure__, strict=True))["frame"].cell_contents if "frame" in names else None
    return found if isinstance(found, checkpoint._CheckpointFrame) else None


def arguments_of(frame: Any) -> tuple[Any, ...] | None:
    """Return the arguments of a checkpoint that is under way in this thread. Those that it saves cannot be read yet."""
    at: Any = sys._getframe().f_back
    while at is not None:
        if at.f_code.co_name == "checkpoint" and at.f_globals is vars(checkpoint):
            inner = getattr(at.f_locals.get("gen"), "gi_frame", None)
            if inner is not None and inner.f_locals.get("new_frame") is frame:
                found: tuple[Any, ...] = at.f_locals["args"]
                return found
        at = at.f_back
    return None


def is_saved(tensor: Tensor) -> bool:
    """Whether C++ refers to a tensor, as to what a checkpoint saves. If unknown, a user would seem to refer to it."""
    return bool(tensor._use_count() > 1)  # type: ignore[attr-defined]


#: What ends a checkpoint's recomputation early. Taken for an error of the model, it would be run again for nothing.
StopRecomputation: type[Exception] = checkpoint._StopRecomputationError


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return a module's hooks. If unknown, a hook that was added since would be taken for no change."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def shards_of(module: nn.Module) -> Iterator[tuple[list[nn.Parameter], nn.Parameter | None, bool]]:
    """Yield the parameters that ``fully_shard`` manages for a module: the parts that this process holds, the whole.

    The whole is one object from the first time that it is gathered; None before. True is for a parameter that tensor
    parallelism splits as well. Without this, what is computed with a whole could not be told from its part.
    """
    state = getattr(type(module), "_get_fsdp_state", None)
    for group in () if state is None else _groups_of(state(module)):
        for own in group.fsdp_params:
            parts = [own.sharded_param, getattr(own, "_sharded_post_forward_param", None)]
            yield [p for p in parts if p is not None], getattr(own, "_unsharded_param", None), own.is_dtensor


def shards_in(model: nn.Module) -> list[tuple[list[nn.Parameter], nn.Parameter | None, bool]]:
    """Return the same for all modules of a model; without ``fully_shard``'s module there are none to look for."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    return [shard for module in model.modules() for shard in shards_of(module)]


def _groups_of(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)  # PyTorch before 2.12 has one or none
    return [g for g in ([state._fsdp_param_group] if groups is None else groups) if g is not None]


#: Nodes of ``fully_shard`` in a graph, which pass gradients on. If unknown, clipping would check their proportion.
NODES_OF_SHARDS = frozenset({"RegisterPostBackwardFunctionBackward"})


def is_hook_of_shards(hook: Any) -> bool:
    """Whether a hook of a module is one of ``fully_shard``. Without it, users' hooks would see the batch."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def has_global_hooks(*, backward: bool = False) -> bool:
    """Whether hooks of all modules are registered; with ``backward``, such hooks of gradients."""
    tables = [module._global_backward_hooks, module._global_backward_pre_hooks]
    tables += [] if backward else [module._global_forward_hooks, module._global_forward_pre_hooks]
    return any(tables)


def in_backward() -> bool:
    """Whether this thread runs a backward pass. If unknown, a checkpoint's recomputation would be a call of its own."""
    return bool(torch._C._current_graph_task_id() != -1)


class lowered:  # noqa: N801 - reads as a statement: ``with lowered():``
    """Run operations one level of ``torch.func`` lower, where the tensors of a ``vmap`` are batches."""

    def __enter__(self) -> None:
        self._layer = _functorch.pop_dynamic_layer_stack()

    def __exit__(self, *error: object) -> None:
        _functorch.push_dynamic_layer_stack(self._layer)


@contextlib.contextmanager
def entered(level: int, samples: int) -> Iterator[None]:
    """Enter a level of ``vmap`` that is over, where its tensors are alive again; others are left for the time."""
    layers = []
    while (_functorch.maybe_current_level() or 0) >= level:
        layers.append(_functorch.pop_dynamic_layer_stack())
    _count_mapping(1)
    try:
        if _functorch._vmap_increment_nesting(samples, "different") != level:
            raise RuntimeError("the backward pass of a checkpoint must run outside of torch.func's transforms")
        yield
    finally:
        _functorch._vmap_decrement_nesting()
        _count_mapping(-1)
        for layer in reversed(layers):
            _functorch.push_dynamic_layer_stack(layer)


_mapping = 0
_mapping_lock = threading.Lock()


def vmap(
    function: Callable[_Arguments, _Result], randomness: str = "error", in_dims: Any = 0
) -> Callable[_Arguments, _Result]:
    """``torch.func.vmap`` without its warning about operators that it calls sample by sample.

    This switch belongs to the process. So do warning filters, but another thread may restore them in the meantime.
    """

    def mapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        _count_mapping(1)
        try:
            result: _Result = torch.func.vmap(function, in_dims, randomness=randomness)(*args, **kwargs)
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
    """Whether a compiler or tracer records the operations. If unknown, work in pieces would be recorded as pieces."""
    return torch.compiler.is_compiling() or _python_dispatch.is_in_torch_dispatch_mode()


def is_readable(*tensors: Tensor) -> bool:
    """Whether Python may read values. If unknown, a branch on values would fail in a trace or be fixed in a graph."""
    hidden = (isinstance(t, FakeTensor) or _functorch.is_functorch_wrapped_tensor(t) for t in tensors)
    return not (is_traced() or any(hidden))


def outside_of_compilation(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return ``torch.compiler.disable(function)``, but do not import the compiler for it if nothing else has."""
    if "torch._dynamo" not in sys.modules:
        return function
    left: Callable[_Arguments, _Result] = torch.compiler.disable(function)
    return left


def flat_graph(function: Callable[[Tensor], Any], batch: Tensor, *, functional: bool = False) -> torch.fx.GraphModule:
    """Record every operation of ``function(batch)``, including backward passes, as one flat graph.

    Without it, no model with a backward pass inside ``forward`` could be exported: ``torch.export`` does not follow it.

    The function runs once, on a fake tensor; ValueError if its operations depend on values. The size of dimension 0, at
    least 2 here, becomes a symbol. ``functional`` replaces in-place operations.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (batch.dim() - 1)
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    fake = mode.from_tensor(batch, symbolic_context=context)
    # Some operators compute shapes in C++, where a symbolic size would become a number; the Python dispatcher avoids
    # that. The mode "real" takes the tensor as it is, and it is fake already.
    record = functools.partial(make_fx, tracing_mode="real", _allow_non_fake_inputs=True)
    try:
        with mode, enable_python_dispatcher():
            graph: torch.fx.GraphModule = record(function)(fake)
            if functional:
                graph = record(torch.func.functionalize(graph))(fake)
    except RuntimeError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith("fastgrad."):
            raise  # its message names what cannot be recorded for every batch size
        raise ValueError(
            "model must not choose what it computes by the values of its inputs, hand them to NumPy, or use an "
            "operation that PyTorch has for values alone, where a graph of it is recorded; PyTorch says: "
            + str(error).partition("\n")[0]
        ) from error
    return graph


#: A cache is that of the process.
_cache_lock = threading.RLock()


@contextlib.contextmanager
def private_cache() -> Iterator[None]:
    """Give the compiler a new cache, unless the environment names one; afterwards remove it, shared objects and all.

    PyTorch's own has a well-known name in the shared temporary folder, where another user may have put what it would
    read, compile and load.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with _cache_lock, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.setdefault(name, folder)
        # Even this import makes the folder of the cache.
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        if before == default_cache_dir():  # PyTorch itself puts it into the environment
            os.environ[name] = folder
        try:
            yield
        finally:
            del os.environ[name]
            os.environ.update({} if before is None else {name: before})


def require_cpp_compiler(what: str) -> None:
    """Raise RuntimeError unless a C++ compiler is installed; PyTorch's own error names neither cause nor remedy."""
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


def compile_package(program: torch.export.ExportedProgram, file: Path) -> None:
    """Compile ``program`` to native code in a ``.pt2``."""
    import torch._inductor.config

    options: dict[str, Any] = {
        # Otherwise the number of this machine's cores would be compiled in.
        "cpp.dynamic_threads": True,
        # Precompiled headers lie under a well-known name in the shared temporary folder, whatever cache is in use: what
        # another user puts there would be compiled into the file.
        "aot_inductor.precompile_headers": False,
        # Round as the CPU's own operators do: a difference in the last digit that moves an activation across the kink
        # of a ReLU opens or closes a path of the backward pass.
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    # Otherwise the code would use every instruction of this machine. Older PyTorch has no such option.
    if platform.machine() in ("x86_64", "AMD64") and getattr(torch._inductor.config.cpp, "march", "") is None:
        options["cpp.march"] = X86.get(torch.backends.cpu.get_cpu_capability())
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)


def load_package(file: Path) -> Callable[[Tensor], list[Tensor]]:
    """Load the function in a ``.pt2`` that `compile_package` wrote; it takes one tensor.

    ``torch._inductor.aoti_load_package`` would first compile three small programs to warn of another kind of processor,
    or load them from its cache, where another user may have put his own.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)

    def run(x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = loader.boxed_run([x])
        return outputs

    return run


@contextlib.contextmanager
def keeping(*operators: torch._ops.OpOverload) -> Iterator[None]:
    """Make compiled code call PyTorch's kernels for these operators. Without this, it rounds differently."""
    from torch._inductor import decomposition

    tables = [decomposition.decompositions, decomposition.fast_random_decomps()]
    kept = [(table, name, table.pop(name)) for table in tables for name in operators if name in table]
    # Silence its warning that such a call is looked up by name.
    log = logging.getLogger("torch._inductor.ir")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        for table, name, function in kept:
            table[name] = function
