"""``record`` and ``grad_sqnorm``: per-sample squared gradient norms in place of ``torch.autograd.grad``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import is_transformed, next_number, original, outside_of_compilation
from fastgrad.batches import batch_size
from fastgrad.engine.backward import looped, probe_grads
from fastgrad.engine.copy import Redirect
from fastgrad.engine.network import Network
from fastgrad.engine.refusals import refuse_mixing, refuse_parts, refuse_untracked
from fastgrad.engine.run import RecomputedSite, Run
from fastgrad.engine.steps import noting
from fastgrad.gradients.dependence import Call, require_called, require_plain, require_returned
from fastgrad.losses import compute_dtype


class _Active(threading.local):
    """The open recordings of a thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[record] = []


_active = _Active()
# By the id of a module, its redirection and how many recordings of it are open in all threads.
_open: dict[int, tuple[Redirect, int]] = {}
_networks: weakref.WeakKeyDictionary[nn.Module, Network] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


_Recording = TypeVar("_Recording", bound="record")


class record:  # noqa: N801 - reads as a statement: ``with record(model):``
    """Context in which `grad_sqnorm` computes norms for this thread's calls of ``model`` or its submodules.

    Inside, ordinary calls and backward passes work as always, and modules keep their mode (batch norm must be in
    evaluation mode). ``forward`` of the model's modules is redirected on the instances for this thread; leaving the
    context puts it back. Activation checkpointing (``use_reentrant=False``) and gradient accumulation work as always,
    and so do hooks of modules. Hooks of parameters (``Tensor.register_hook``) see summed gradients; norms ignore
    them.

    Args:
        model: The model to be called inside. If it is ``DistributedDataParallel``, or ``DataParallel`` on one device,
            the module that it wraps is recorded.

    Raises:
        TypeError: If ``model`` is not an ordinary ``torch.nn.Module``, or holds scripted modules, complex parameters or
            parts of parameters.
        ValueError: If it has batch norm in training mode, was compiled in place, is replicated on several devices, or
            lies on a device without values (meta) or without float64 (mps). A call raises it for a module that is
            recomputed in the backward pass and draws random numbers, such as attention with dropout.

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
        #: Calls whose graph is alive, and the latest one.
        self.calls: list[Call] = []
        #: Sequence numbers of operations in calls that ``torch.func`` transforms, which have no probes.
        self.transformed: list[range] = []
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
        # Another thread may leave the context, as when it collects an abandoned generator.
        stack, modules = self._entered.pop()
        stack.remove(self)
        self.calls.clear()
        self.transformed.clear()
        with _lock:
            for module in modules:
                redirect, count = _open.pop(id(module))
                if count > 1:
                    _open[id(module)] = (redirect, count - 1)
                else:
                    redirect.restore(module.__dict__)

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run one call with probes."""
        keys: dict[str, int] = {}
        for name, parameter in module.named_parameters():
            if parameter.grad_fn is not None:
                raise ValueError(
                    f"model must be called with parameters of its own; {name!r} was computed (functional_call)"
                )
            keys[name] = id(parameter)
        with _lock:
            network = _networks.get(module)
            # The dictionary compares by equality, which modules may define.
            if network is None or network.model is not module:
                network = _networks[module] = Network(module, recorded=True)
        samples = batch_size(args, kwargs)
        # A cast of a parameter in autocast's cache would belong to the graph of another call, or to none.
        torch.clear_autocast_cache()
        # An empty batch, which random sampling may draw, has no samples to plan with and no norms.
        run, earlier, first = Run(samples), list(self.calls), next_number()
        with noting(None):
            plan = network.plan(args, kwargs, samples) if samples else None
            output = network.forward(plan, run, args, kwargs)
        torch.clear_autocast_cache()
        if run.plan is not None and run.plan.untracked:
            # A closure calls the user's modules instead of their copies; such calls are recorded like any other.
            inner = [call for call in self.calls if not any(call is other for other in earlier)]
            seen = {key for call in inner for key in call.keys.values()}
            refuse_untracked([name for name in run.plan.untracked if keys[name] not in seen])
        self.calls = [call for call in self.calls if call.run() is not None]
        outputs = () if run.plan is None else run.plan.outputs
        numbers = range(run.first, next_number() if samples else run.first)
        self.calls.append(Call(keys, weakref.ref(run), outputs, samples, numbers, range(first, run.first)))
        return output

    def _call_transformed(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run a call without probes and note its operations, including those of calls within it."""
        first = next_number()
        output = forward(*args, **kwargs)
        while self.transformed and self.transformed[-1].start >= first:
            self.transformed.pop()
        self.transformed.append(range(first, next_number()))
        return output


def _dispatch(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    for recording in reversed(_active.stack):
        if any(module is own for _, modules in recording._entered for own in modules):
            if not torch.is_grad_enabled() or not any(True for _ in module.parameters()):
                break
            # While torch.compile traces this call, it would mistake the check for a transform.
            if not torch.compiler.is_compiling() and is_transformed():
                return recording._call_transformed(forward, args, kwargs)
            # torch.compile cannot follow a recorded call, which builds modules.
            return outside_of_compilation(recording._call)(module, args, kwargs)
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
        params: Parameters of the recorded model, in any order.
        grad_outputs: As in ``torch.autograd.grad``, but a tensor for each of ``outputs``, or None for all.
        is_grads_batched: Whether ``grad_outputs`` has a leading dimension S of several gradients; what depends
            on activations alone is then computed once for all of them.
        retain_graph: Whether to keep the graph for another call.

    Returns:
        One tensor per parameter, ``(B,)``, or ``(S, B)`` for batched gradients; float32 (float64 for a float64
        model). Zeros for a parameter the outputs do not depend on. Only gradients that flow through calls of the
        model count: a weight decay added to the loss has no gradient per sample. Where the loss of one sample depends
        on others, as a contrastive one, a norm is that of the sample's share of the batch's gradient.

    Raises:
        RuntimeError: Outside of ``record``, or if no recorded call leads to ``outputs``.
        ValueError: If a parameter is not the recorded model's, took part in several calls, or is used outside of
            calls as well, other than in a term of its own like a weight decay. Also for outputs that depend on calls
            that ``torch.func`` transforms, and for a gradient penalty: outputs that depend on gradients
            (``create_graph=True``) which passed the model. And for a parameter that no layer rule serves, if outputs
            depend on it other than through what modules return, as through an attribute.
    """
    outputs, wanted = checks.tensors("outputs", outputs), checks.tensors("params", params)
    gradients = None if grad_outputs is None else checks.tensors("grad_outputs", grad_outputs)
    if is_grads_batched and gradients is None:
        raise ValueError("grad_outputs must be given when is_grads_batched is True; it was None")
    if not _active.stack:
        raise RuntimeError("grad_sqnorm must be called inside record(model)")
    compute = outside_of_compilation(recorded_sqnorms)
    return compute(_active.stack[-1], outputs, wanted, gradients, is_grads_batched, bool(retain_graph))


def recorded_sqnorms(
    recording: record,
    outputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    batched: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Compute `grad_sqnorm` for a given recording."""
    names = {id(p): name for name, p in recording.model.named_parameters()}
    for i, p in enumerate(wanted):
        if id(p) not in names:
            raise ValueError(f"params must be parameters of the recorded model; number {i} is not one")
    if not recording.calls or not any(out.requires_grad for out in outputs):
        raise RuntimeError("outputs must be computed from calls of the recorded model, with gradients enabled")
    # Only the probes of sites that serve a wanted parameter, so that the backward pass goes no further. Calls of other
    # recorded models count, too, if they share a parameter.
    asked = {id(p): names[id(p)] for p in wanted}
    recordings = dict.fromkeys((*_active.stack, recording))
    alive = [(call, run) for each in recordings for call in each.calls if (run := call.run()) is not None]
    calls = [call for call, _ in alive]
    probes = [
        ([call.keys[name] for name in site.parameters], site, probe, run)
        for call, run in alive
        for site, probe in run.probes
        if any(call.keys[name] in asked for name in site.parameters)
    ]
    ruled = {key for keys, site, _, _ in probes if not isinstance(site, RecomputedSite) for key in keys}
    taps = {id(probe) for _, site, probe, _ in probes if isinstance(site, RecomputedSite)}
    stops = {id(probe) for _, run in alive for _, probe in run.probes}
    require_plain(outputs, asked, stops, [numbers for each in recordings for numbers in each.transformed])
    require_returned(outputs, {key: name for key, name in asked.items() if key not in ruled}, taps, calls)
    sqnorms = probe_grads(
        outputs, [probe for _, _, probe, _ in probes], gradients, batched=batched, keep=keep,
        looped=looped((run for _, run in alive), [site for _, site, _, _ in probes], outputs[0]),
    )  # fmt: skip
    sizes = require_called(outputs, asked, calls, empty=recording.calls[-1].samples == 0)
    reached = [(*probe, norms) for probe, norms in zip(probes, sqnorms, strict=True) if norms is not None]
    by_key: dict[int, Tensor] = {}
    for keys, _, _, _, norms in reached:
        for column, key in enumerate(keys):
            if key in by_key:
                raise ValueError(
                    f"params must each take part in one call of the recorded model; {names[key]!r} took part in "
                    "several. Make these calls in the forward of a module of your own, and record this"
                )
            if key in asked:
                by_key[key] = norms[..., column]
    # Parameters that the outputs do not depend on get zeros, one per sample of the calls that the outputs reach.
    rows = {run.samples for _, _, _, run, _ in reached}
    rows = rows if len(rows) == 1 else sizes
    leading = (gradients[0].shape[0],) if batched and gradients is not None else ()
    for p in wanted:
        if id(p) not in by_key:
            if len(rows) > 1:
                raise ValueError(
                    f"params must each take part in a call that outputs depend on, where calls had batches of "
                    f"{' and '.join(map(str, sorted(rows)))} samples; {names[id(p)]!r} takes part in none"
                )
            shape = (*leading, next(iter(rows), recording.calls[-1].samples))
            by_key[id(p)] = torch.zeros(shape, dtype=compute_dtype(p.dtype), device=p.device)
    return tuple(by_key[id(p)] for p in wanted)
