"""``record`` and ``grad_sqnorm``: per-sample squared gradient norms in place of ``torch.autograd.grad``."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import in_backward, is_transformed, original, outside_of_compilation
from fastgrad.engine import graph
from fastgrad.engine.inputs import BatchDims
from fastgrad.engine.modules import put_back, redirect
from fastgrad.engine.norms import squared_norms
from fastgrad.engine.recorded import Recorded
from fastgrad.engine.refusals import refuse_mixing, refuse_parts
from fastgrad.engine.run import run
from fastgrad.engine.sharded import named_parameters, names_of, whole
from fastgrad.gradients.separate import Outputs, outputs_of, require_separate
from fastgrad.losses import compute_dtype

#: What `grad_sqnorm` and its like take for ``params``.
Params = nn.Module | nn.Parameter | Sequence[nn.Parameter]


class _Active(threading.local):
    """The open recordings of a thread, innermost last, and whether one of its recorded calls is under way."""

    def __init__(self) -> None:
        self.stack: list[record] = []
        self.inside = False


_active = _Active()
_Recording = TypeVar("_Recording", bound="record")


class record:  # noqa: N801 - reads as a statement: ``with record(model):``
    """Context in which `grad_sqnorm` computes norms for this thread's calls of ``model`` or its submodules.

    Inside, a call runs the model under ``vmap``: it sees its samples one by one, each of shape ``(1, ...)``, and so do
    hooks of its submodules. Norms are therefore those of each sample alone, whatever the model does. Outputs are each
    sample's own: a dimension that is 1 for a sample and B in an ordinary call is the batch, and any other tensor of a
    sample becomes a row of ``(B, *shape)``. So a model that returns a loss returns B losses. What does not depend on
    the samples is returned as it is. Attributes that the model writes hold rows likewise. Ordinary backward passes work
    as always, and modules keep their mode (batch norm must be in evaluation mode). What ``vmap`` cannot run, runs
    sample by sample: as exact, and slower. ``forward`` of the model's modules is redirected on the instances for this
    thread; leaving the context puts it back. Lists and dicts among the inputs are copies: what the model writes to them
    stays inside. Hooks of parameters (``Tensor.register_hook``) see summed gradients; norms ignore them.

    Args:
        model: The model to be called inside. If it is ``DistributedDataParallel``, or ``DataParallel`` on one device,
            the module that it wraps is recorded. ``fully_shard`` may shard it: each rank then gets what the whole
            model gives for its own samples, and gathers when FSDP does.
        batch_dims: Which inputs carry the batch. By default, those tensors that have as many rows as the first one,
            in dimension 0. 0 says the same where another one is square in the batch, such as a padding mask
            ``(B, T)`` with ``T = B``, which is refused otherwise. A mapping from an input's name or position gives
            the dimension, or None for an input that all samples share.

    Raises:
        TypeError: If ``model`` is not an ordinary ``torch.nn.Module``, or holds scripted modules, complex parameters or
            parts of parameters other than those of ``fully_shard``.
        ValueError: If it has batch norm in training mode, was compiled in place, is replicated on several devices, or
            is on the meta device or on one without float64 (mps). Calls raise it for inputs that are square in the
            batch, for outputs that differ in structure or shape between samples, and the first call on inputs of a
            structure for a model whose samples interact (`check`).

    Example::

        with fastgrad.record(model):
            losses = F.cross_entropy(model(x), y, reduction="none")
            sqnorms = fastgrad.grad_sqnorm(losses, model)
    """

    def __init__(self, model: nn.Module, *, batch_dims: BatchDims = None) -> None:
        checks.is_a(nn.Module, model=model)
        refuse_parts(model, gathered=True)
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
        checks_batch_dims(batch_dims)
        self.batch_dims = batch_dims
        #: Batch sizes of the calls so far.
        self.batches: set[int] = set()
        #: Ids of the modules whose calls were recorded; a checkpoint around one calls it again on the way back.
        self._called: set[int] = set()
        #: Calls of submodules on inputs that may be no batch, such as positions.
        self._doubtful: list[tuple[Recorded, Outputs, str]] = []
        #: For each entry that was not yet left, the thread's recordings and the redirected modules.
        self._entered: list[tuple[list[record], list[nn.Module]]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Have copies and pickles, which hold the model as well, begin outside of the context."""
        return _again, (type(self), self.model, {"batch_dims": self.batch_dims})

    def __enter__(self: _Recording) -> _Recording:
        refuse_mixing(self.model, training=True)
        modules = list(self.model.modules())
        redirect(modules, _dispatch)
        self._entered.append((_active.stack, modules))
        _active.stack.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        # Another thread may leave the context, for example when it collects an abandoned generator.
        stack, modules = self._entered.pop()
        stack.remove(self)
        self.batches.clear()
        self._doubtful.clear()
        put_back(modules, _dispatch)

    def _call(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run one call on each of its samples."""
        named = named_parameters(self.model)
        for name, parameter in (named if module is self.model else named_parameters(module)).items():
            if parameter.grad_fn is not None:
                raise ValueError(
                    f"model must be called with parameters of its own; {name!r} was computed (functional_call)"
                )
        # A cast of a parameter in autocast's cache would belong to the graph of another call, or to none.
        torch.clear_autocast_cache()
        wanted = {id(p): p for p in named.values()}
        _active.inside = True
        try:
            output, recorded = run(
                module, lambda other: forward if other is module else other.forward, args, kwargs, wanted,
                batch_dims=self.batch_dims if module is self.model or self.batch_dims == 0 else None,
            )  # fmt: skip
        finally:
            _active.inside = False
            torch.clear_autocast_cache()
        self._called.add(id(module))
        if module is not self.model and not recorded.inputs:
            name = next((name for name, own in self.model.named_modules() if own is module), type(module).__name__)
            self._doubtful.append((recorded, outputs_of(output, recorded), name))
        self._note(output, recorded)
        return output

    def _note(self, output: Any, recorded: Recorded) -> None:
        """Remember a call."""
        self.batches.add(recorded.samples)


def _again(kind: type[record], model: nn.Module, options: Mapping[str, Any]) -> record:
    return kind(model, **options)


def checks_batch_dims(batch_dims: object) -> None:
    """Raise TypeError unless an argument ``batch_dims`` is None, 0 or a mapping from inputs to dimensions."""
    named = isinstance(batch_dims, Mapping) and all(
        isinstance(key, (str, int)) and (dim is None or type(dim) is int) for key, dim in batch_dims.items()
    )
    if not (batch_dims is None or named or (type(batch_dims) is int and batch_dims == 0)):
        raise TypeError(
            f"batch_dims must be None, 0, or a mapping from names or positions of inputs to dimensions or None; it was "
            f"{batch_dims!r}"
        )


def _dispatch(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    if not _active.inside:
        for recording in reversed(_active.stack):
            if any(module is own for _, modules in recording._entered for own in modules):
                if not torch.is_grad_enabled() or is_transformed() or not any(True for _ in module.parameters()):
                    break
                if in_backward() and id(module) not in recording._called:
                    break  # a checkpoint inside a recorded call computes a part of it again
                # torch.compile cannot follow a recorded call.
                return outside_of_compilation(recording._call)(module, forward, args, kwargs)
    return forward(*args, **kwargs)


def grad_sqnorm(
    losses: Tensor | Sequence[Tensor],
    params: Params,
    *,
    grad_outputs: Tensor | Sequence[Tensor] | None = None,
    is_grads_batched: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:
    """Return the squared L2 norm of each sample's gradient, where ``torch.autograd.grad`` returns their sum.

    Args:
        losses: Losses ``(B,)``, one a sample (``reduction="none"``), their sum, or any tensors computed from the
            recorded model's outputs, which are summed. A mean over samples is refused: it divides every gradient by B.
        params: The recorded model, a module of it, a parameter, or parameters in any order. The uses of a parameter in
            several calls add up, if these have the same number of samples.
        grad_outputs: As in ``torch.autograd.grad``, but a tensor for each of ``losses``, or None for all.
        is_grads_batched: Whether ``grad_outputs`` has a leading dimension S of several gradients; what depends
            on activations alone is then computed once for all of them.
        retain_graph: Whether to keep the graph for another call.

    Returns:
        One tensor per parameter, ``(B,)``, or ``(S, B)`` for batched gradients; float32 (float64 for a float64
        model). Zeros for a parameter the losses do not depend on. Where the loss of one sample depends on others, such
        as a contrastive one, the norm describes only the sample's share of the batch's gradient.

    Raises:
        RuntimeError: Outside of ``record``, or if no recorded call leads to ``losses``.
        ValueError: If a parameter is not the recorded model's, or if ``losses`` use one outside of recorded calls: a
            weight decay has no gradient per sample and belongs into the optimizer. Also for a scalar that is a mean
            over samples, for calls of different numbers of samples that share a parameter, for a submodule that was
            called on something that is no batch, and for a gradient penalty: losses that depend on gradients
            (``create_graph=True``) which passed the model.
    """
    outputs, wanted = checks.tensors("losses", losses), parameters_given(params)
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


def parameters_given(params: Params) -> list[Tensor]:
    """Return the parameters of an argument: a module, a parameter or several; TypeError for anything else."""
    if isinstance(params, nn.Module):
        return list(named_parameters(params).values())
    return checks.tensors("params", params)


def parameters_of(recording: record, wanted: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return parameters of the recorded model by their ids; ValueError if one is not the model's.

    ``wanted`` are `whole`.
    """
    own = set(map(id, named_parameters(recording.model).values()))
    for i, p in enumerate(wanted):
        if id(p) not in own:
            raise ValueError(f"params must be parameters of the recorded model; number {i} is not one")
    return {id(p): p for p in wanted}


def summed(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients at ``outputs`` of the sum of all their numbers."""
    return [torch.ones_like(out) for out in outputs]


def recorded_sqnorms(
    recording: record, outputs: Sequence[Tensor], wanted: Sequence[Tensor], gradients: Sequence[Tensor] | None,
    batched: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute `grad_sqnorm` for a recording."""
    wanted = whole(recording.model, wanted)
    asked = parameters_of(recording, wanted)
    names = names_of(recording.model)
    calls = calls_behind(recording, outputs, "losses", given=gradients is not None)
    rows = {recorded.samples for recorded in calls}
    leading = (gradients[0].shape[0],) if batched and gradients is not None else ()
    at = summed(outputs) if gradients is None else gradients
    found: dict[int, Tensor] = {}
    for samples in rows - {0}:
        own = [recorded for recorded in calls if recorded.samples == samples]
        norms_of = squared_norms(own, outputs, at, asked, batched=batched, keep=keep or len(rows) > 1)
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
                    f"params must each take part in a call that losses depend on, where calls had batches of "
                    f"{' and '.join(map(str, sorted(rows)))} samples; {names[key]!r} takes part in none"
                )
            shape = (*leading, next(iter(rows)))
            found[key] = torch.zeros(shape, dtype=compute_dtype(p.dtype), device=p.device)
    return tuple(found[id(p)] for p in wanted)


def calls_behind(recording: record, outputs: Sequence[Tensor], argument: str, *, given: bool = False) -> list[Recorded]:
    """Return the recorded calls that ``outputs``, an ``argument`` of the caller, reach.

    ``given`` says that their gradients are. Raise RuntimeError if they reach no call. Raise ValueError if they use a
    parameter of the recorded model outside of calls, if one is a mean over samples, or if a submodule was called on
    something that is no batch.
    """
    calls, outside = graph.calls_and_leaves(outputs)
    if not calls:
        if recording.batches == {0}:
            return [Recorded({}, 0)]
        raise RuntimeError(
            f"{argument} must be computed from calls of the recorded model, with gradients enabled; they reach none"
        )
    for key, name in names_of(recording.model).items():
        if key in outside:
            raise ValueError(
                f"{argument} must depend on {name!r} through recorded calls of the model or of its modules alone; it "
                "is used outside of them, where no gradient per sample is known: in a weight decay (which belongs into "
                "the optimizer), another method than forward, a call that torch.func transforms, or a gradient "
                "penalty. Call such functions from the forward of a module of your own, and record this"
            )
    mean = "" if given else graph.mean_over_samples(outputs)
    if mean:
        raise ValueError(
            f"{argument} must be losses of shape (B,), one a sample, or a sum over samples; it was a mean ({mean}), "
            'which divides every gradient by the number of samples. Use reduction="none"'
        )
    own = outputs[0] if len(outputs) == 1 and outputs[0].dim() == 1 and not given else None
    for recorded, made, name in recording._doubtful:
        if id(recorded) in calls and recorded.samples > 1:
            _require_batch(recorded, made, name, own, argument)
    return list(calls.values())


def _require_batch(recorded: Recorded, made: Outputs, name: str, losses: Tensor | None, argument: str) -> None:
    """Raise ValueError unless each of ``losses`` depends on its own row of what a submodule returned."""
    what = f"module {name!r} was called on a batch of {recorded.samples}"
    if losses is None or len(losses) != recorded.samples:
        if recorded.lines:
            raise ValueError(
                f"{argument} must be losses of shape ({recorded.samples},), where {what}, a tensor of one dimension, "
                "which may hold positions; call it from the forward of a module of your own, and record this"
            )
        return
    try:
        require_separate(losses, made)
    except ValueError as error:
        raise ValueError(
            f"{argument} must each depend on their own row of what a submodule returns, where {what}, which may hold "
            "positions or other inputs that all samples share; they do not. Call it from the forward of a module of "
            "your own, and record this"
        ) from error
