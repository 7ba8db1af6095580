"""``record`` and ``grad_sqnorm``: per-sample squared gradient norms in place of ``torch.autograd.grad``."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import in_backward, is_transformed, next_number, number_of, original, outside_of_compilation
from fastgrad.engine import graph
from fastgrad.engine.modules import Redirect
from fastgrad.engine.norms import squared_norms
from fastgrad.engine.refusals import refuse_mixing, refuse_parts
from fastgrad.engine.run import run
from fastgrad.engine.structure import Recorded, Structure
from fastgrad.losses import compute_dtype


class _Active(threading.local):
    """The open recordings of a thread, innermost last, and whether one of its recorded calls is under way."""

    def __init__(self) -> None:
        self.stack: list[record] = []
        self.inside = False


_active = _Active()
# By the id of a module, its redirection and how many recordings of it are open in all threads.
_open: dict[int, tuple[Redirect, int]] = {}
_lock = threading.Lock()
_TRANSFORMED = (
    "a call that torch.func transforms (vmap, jacrev). Make that in the forward of a module of your own, and "
    "record this"
)
_FIRST = "the ordinary call that a first call is compared with, such as from a hook's list. Use only the latest entry"
_Recording = TypeVar("_Recording", bound="record")


class record:  # noqa: N801 - reads as a statement: ``with record(model):``
    """Context in which `grad_sqnorm` computes norms for this thread's calls of ``model`` or its submodules.

    Inside, a call runs the model under ``vmap``: it sees its samples one by one, each of shape ``(1, ...)``, and so do
    hooks of its submodules. Norms are therefore those of each sample alone, whatever the model does. Outputs and
    attributes that the model writes are those of the batch, ordinary backward passes work as always, and modules keep
    their mode (batch norm must be in evaluation mode). What ``vmap`` cannot run, runs sample by sample: as exact, and
    slower. ``forward`` of the model's modules is redirected on the instances for this thread; leaving the context puts
    it back. Lists and dicts among the inputs are copies: what the model writes to them stays inside. Hooks of
    parameters (``Tensor.register_hook``) see summed gradients; norms ignore them.

    Args:
        model: The model to be called inside. If it is ``DistributedDataParallel``, or ``DataParallel`` on one device,
            the module that it wraps is recorded.

    Raises:
        TypeError: If ``model`` is not an ordinary ``torch.nn.Module``, or holds scripted modules, complex parameters or
            parts of parameters.
        ValueError: If it has batch norm in training mode, was compiled in place, is replicated on several devices, or
            is on the meta device or on one without float64 (mps). The first call on inputs of a structure raises it for
            a model whose samples interact, or which draws random numbers in evaluation mode.

    Example::

        with fastgrad.record(model):
            loss = F.cross_entropy(model(x), y, reduction="sum")
            sqnorms = fastgrad.grad_sqnorm(loss, list(model.parameters()))
    """

    def __init__(self, model: nn.Module) -> None:
        checks.is_a(nn.Module, model=model)
        refuse_parts(model)
        if original(model) is not model:
            raise TypeError("model must be the module that was given to torch.compile, not its compiled form")
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(
                "model must not be replicated on several devices by DataParallel; use DistributedDataParallel"
            )
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        whole: Any = model.module if isinstance(model, parallel) else model
        self.model: nn.Module = whole
        if getattr(self.model, "_compiled_call_impl", None) is not None:
            raise ValueError("model must not be compiled in place (model.compile()); compile its parts instead")
        #: Batch sizes of the calls so far.
        self.batches: set[int] = set()
        #: Sequence numbers of operations in calls without probes, and what these calls are.
        self.outside: list[tuple[range, str]] = []
        #: Ids of the modules whose calls were recorded; a checkpoint around one calls it again on the way back.
        self._called: set[int] = set()
        #: For each entry that was not yet left, the thread's recordings and the redirected modules.
        self._entered: list[tuple[list[record], list[nn.Module]]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Have copies and pickles, which hold the model as well, begin outside of the context."""
        return type(self), (self.model,)

    def __enter__(self: _Recording) -> _Recording:
        refuse_mixing(self.model, training=True)
        modules = list(self.model.modules())
        with _lock:
            for module in modules:
                redirect, count = _open.get(id(module), (None, 0))
                if redirect is None:
                    redirect = Redirect(module, _dispatch)
                    module.__dict__["forward"] = redirect
                _open[id(module)] = (redirect, count + 1)
        self._entered.append((_active.stack, modules))
        _active.stack.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        # Another thread may leave the context, for example when it collects an abandoned generator.
        stack, modules = self._entered.pop()
        stack.remove(self)
        self.batches.clear()
        self.outside.clear()
        with _lock:
            for module in modules:
                redirect, count = _open.pop(id(module))
                if count > 1:
                    _open[id(module)] = (redirect, count - 1)
                else:
                    redirect.restore(module.__dict__)

    def _call(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run one call on each of its samples."""
        for name, parameter in module.named_parameters():
            if parameter.grad_fn is not None:
                raise ValueError(
                    f"model must be called with parameters of its own; {name!r} was computed (functional_call)"
                )
        # A cast of a parameter in autocast's cache would belong to the graph of another call, or to none.
        torch.clear_autocast_cache()
        _active.inside = True
        try:
            output, recorded = run(module, forward, args, kwargs, {id(p): p for p in self.model.parameters()})
        finally:
            _active.inside = False
            torch.clear_autocast_cache()
        self._called.add(id(module))
        self._note(output, recorded)
        return output

    def _note(self, output: Any, recorded: Recorded) -> None:
        """Remember a call."""
        self.batches.add(recorded.samples)
        if recorded.ordinary_numbers:
            self.outside.append((recorded.ordinary_numbers, _FIRST))

    def _call_transformed(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run a call without probes and note its operations, including those of calls within it."""
        first = next_number()
        output = forward(*args, **kwargs)
        while self.outside and self.outside[-1][0].start >= first:
            self.outside.pop()
        self.outside.append((range(first, next_number()), _TRANSFORMED))
        return output


def _dispatch(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    if not _active.inside:
        for recording in reversed(_active.stack):
            if any(module is own for _, modules in recording._entered for own in modules):
                if not torch.is_grad_enabled() or not any(True for _ in module.parameters()):
                    break
                if in_backward() and id(module) not in recording._called:
                    break  # a checkpoint inside a recorded call computes a part of it again
                if is_transformed():
                    return recording._call_transformed(forward, args, kwargs)
                # torch.compile cannot follow a recorded call.
                return outside_of_compilation(recording._call)(module, forward, args, kwargs)
    return forward(*args, **kwargs)


def grad_sqnorm(
    outputs: Tensor | Sequence[Tensor],
    params: nn.Parameter | Sequence[nn.Parameter],
    *,
    grad_outputs: Tensor | Sequence[Tensor] | None = None,
    is_grads_batched: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:
    """Return the squared L2 norm of each sample's gradient, where ``torch.autograd.grad`` returns their sum.

    Args:
        outputs: A loss that is a *sum* over samples, or any tensors computed from the recorded model's outputs. A mean
            divides every gradient by B.
        params: Parameters of the recorded model, in any order. The uses of a parameter in several calls add up, if
            these have the same number of samples.
        grad_outputs: As in ``torch.autograd.grad``, but a tensor for each of ``outputs``, or None for all.
        is_grads_batched: Whether ``grad_outputs`` has a leading dimension S of several gradients; what depends
            on activations alone is then computed once for all of them.
        retain_graph: Whether to keep the graph for another call.

    Returns:
        One tensor per parameter, ``(B,)``, or ``(S, B)`` for batched gradients; float32 (float64 for a float64
        model). Zeros for a parameter the outputs do not depend on. Only gradients that flow through calls of the
        model count: a weight decay added to the loss has no gradient per sample. Where the loss of one sample depends
        on others, such as a contrastive one, the norm describes only the sample's share of the batch's gradient.

    Raises:
        RuntimeError: Outside of ``record``, or if no recorded call leads to ``outputs``.
        ValueError: If a parameter is not the recorded model's, or is used outside of calls as well, other than in a
            term of its own such as a weight decay. Also for calls of different numbers of samples that share a
            parameter, for outputs that depend on calls that ``torch.func`` transforms, and for a gradient penalty:
            outputs that depend on gradients (``create_graph=True``) which passed the model.
    """
    outputs, wanted = checks.tensors("outputs", outputs), checks.tensors("params", params)
    gradients = None if grad_outputs is None else checks.tensors("grad_outputs", grad_outputs)
    if is_grads_batched and gradients is None:
        raise ValueError("grad_outputs must be given when is_grads_batched is True; it was None")
    recording = active("grad_sqnorm")
    compute = outside_of_compilation(recorded_sqnorms)
    return compute(recording, outputs, wanted, gradients, is_grads_batched, bool(retain_graph))


def active(name: str) -> record:
    """Return the innermost recording of this thread, for the function of this name."""
    if not _active.stack:
        raise RuntimeError(f"{name} must be called inside record(model)")
    return _active.stack[-1]


def parameters_of(recording: record, wanted: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return parameters of the recorded model by their ids; ValueError if one is not the model's."""
    own = set(map(id, recording.model.parameters()))
    for i, p in enumerate(wanted):
        if id(p) not in own:
            raise ValueError(f"params must be parameters of the recorded model; number {i} is not one")
    return {id(p): p for p in wanted}


def recorded_sqnorms(
    recording: record, outputs: Sequence[Tensor], wanted: Sequence[Tensor], gradients: Sequence[Tensor] | None,
    batched: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute `grad_sqnorm` for a recording."""
    asked = parameters_of(recording, wanted)
    names = {id(p): name for name, p in recording.model.named_parameters()}
    calls = calls_behind(recording, outputs, {key: names[key] for key in asked})
    rows = {recorded.samples for recorded in calls}
    leading = (gradients[0].shape[0],) if batched and gradients is not None else ()
    found: dict[int, Tensor] = {}
    for samples in rows - {0}:
        own = [recorded for recorded in calls if recorded.samples == samples]
        norms_of = squared_norms(own, outputs, gradients, asked, batched=batched, keep=keep or len(rows) > 1)
        for key, norms in norms_of.items():
            if key in found:
                raise ValueError(
                    f"params must take part in calls of one number of samples; {names[key]!r} took part in calls of "
                    f"{' and '.join(map(str, sorted(rows)))}"
                )
            found[key] = norms
    for key, p in asked.items():
        if key not in found:
            if len(rows) > 1:
                raise ValueError(
                    f"params must each take part in a call that outputs depend on, where calls had batches of "
                    f"{' and '.join(map(str, sorted(rows)))} samples; {names[key]!r} takes part in none"
                )
            shape = (*leading, next(iter(rows)))
            found[key] = torch.zeros(shape, dtype=compute_dtype(p.dtype), device=p.device)
    return tuple(found[id(p)] for p in wanted)


def calls_behind(
    recording: record, outputs: Sequence[Tensor], names: Mapping[int, str], argument: str = "outputs"
) -> list[Recorded]:
    """Return the recorded calls that ``outputs``, an ``argument`` of the caller, reach.

    Raise RuntimeError if they reach none. Raise ValueError if they reach one of these parameters, ids to names, in a
    call that ``torch.func`` transforms, or if a term of theirs reaches both a call and, outside of calls, one of these
    parameters. A term without calls, such as a weight decay, is allowed: it has no gradient per sample.
    """
    calls, outside = graph.calls_and_leaves(outputs)
    for numbers, what in (pair for each in dict.fromkeys((*_active.stack, recording)) for pair in each.outside):
        inside = [node for node in graph.nodes(outputs) if number_of(node) in numbers]
        if used := graph.calls_and_leaves(inside)[1] & names.keys():
            raise ValueError(
                f"{argument} must depend on {names[used.pop()]!r} through recorded calls of the model; they reach it "
                f"in {what}"
            )
    if not calls:
        if recording.batches == {0}:
            return [Recorded({}, 0, [], Structure())]
        raise RuntimeError(
            f"{argument} must be computed from calls of the recorded model, with gradients enabled; they reach none"
        )
    for nodes in graph.terms(outputs) if outside & names.keys() else ():
        called, used = graph.calls_and_leaves(nodes)
        if called and (used := used & names.keys()):
            raise ValueError(
                f"{argument} must depend on {names[min(used, key=list(names).index)]!r} through calls of the "
                "recorded model or of its modules alone; it is used outside of them as well, such as in another method "
                "than forward. Call that from the forward of a module of your own, and record this"
            )
    return list(calls.values())
