"""Whole-network gradient features: logits and squared gradient norms in one call."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad import checks, losses
from fastgrad._torch import original, outside_of_compilation, pytree
from fastgrad.batches import class_logits, logits_of, one_for_none
from fastgrad.engine import ordinary
from fastgrad.engine.inputs import BatchDims, CallInputs
from fastgrad.engine.norms import squared_norms
from fastgrad.engine.recorded import Recorded
from fastgrad.engine.refusals import refuse_mixing, refuse_parts
from fastgrad.engine.routes import Route, routes_of
from fastgrad.engine.run import run
from fastgrad.engine.sharded import named_parameters
from fastgrad.engine.writes import Snapshot, carried_states, inherit_rows
from fastgrad.evaluation import evaluation_copy
from fastgrad.gradients.contrasts import check_target
from fastgrad.gradients.recorder import checks_batch_dims
from fastgrad.ops.dispatch import IMPLEMENTATIONS, choose, computing_with

#: A fixed target by name, one class index or soft target for all samples, or a function of the logits.
Target = str | int | Tensor | Callable[[Tensor], Tensor]


# On a CPU, large tensors get new memory pages from the system at every call. Pieces of the batch of about this many
# bytes, and at least this many samples, reuse their memory.
_CPU_WORKING_SET = 640 << 20
_CPU_SAMPLES = 16


class GradientFeatures:
    """Squared L2 norms of the gradient of every parameter, for every sample, from one backward pass.

    The model runs in evaluation mode, under ``vmap``, and sees one sample at a time, of shape ``(1, ...)``; so do hooks
    of its modules. It is left as it was: a model in training mode is copied for the call, with shared tensors, and what
    a call writes to attributes and buffers is undone. Frozen parameters get features too.

    The first call on inputs of a structure is compared with an ordinary call of the batch.

    Args:
        model: Maps a batch to logits ``(B, N)``; see `fastgrad.batches.logits_of` for the kinds of outputs it may have.
        loss: ``"cross_entropy"``, ``"bce"``, ``"mse"`` or ``"brier"``.
        target: ``"ones"``, ``"uniform"``, ``"predicted"``, or ``"contrast"`` for every class. Also a class index or a
            soft target ``(N,)`` for all samples, or a function from logits ``(B, N)`` to targets, ``(B,)`` class
            indices or ``(B, N)``.
        reduction: ``"sum"`` or ``"mean"`` over classes.
        signals: Several ``(loss, target)`` pairs in place of ``loss`` and ``target``: one forward and one batched
            backward pass.
        layers: Only these parameters: names or shell patterns of parameters, or names of modules; None for all.
        log: Return natural logarithms of the squared norms, finite even where these underflow or vanish.
        chunk_size: Samples at a time; None for the whole batch on a GPU, and a fast size on a CPU.
        memory_budget: Bytes a call may add, from which the chunk size is estimated if ``chunk_size`` is None.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``, for the layers that have kernels.
        batch_dims: Which inputs carry the batch, as in `record`.

    Raises:
        TypeError, ValueError: For an argument that is not one of the above, a model that mixes samples, or one that
            holds scripted modules, complex parameters or parts of parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str = "bce",
        target: Target = "ones",
        reduction: str = "sum",
        signals: Sequence[tuple[str, Target]] | None = None,
        layers: str | Iterable[str] | None = None,
        log: bool = False,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        impl: str = "auto",
        batch_dims: BatchDims = None,
    ) -> None:
        checks.is_a(nn.Module, model=model)
        refuse_parts(model)
        self.model: nn.Module = original(model)
        checks.one_of("loss", loss, losses.LOSSES)
        checks.one_of("reduction", reduction, losses.REDUCTIONS)
        checks.one_of("impl", impl, IMPLEMENTATIONS)
        checks.is_bool(log=log)
        checks_batch_dims(batch_dims)
        for name, given in (("signals", signals), ("layers", layers)):
            if given is not None and not isinstance(given, Iterable):
                raise TypeError(f"{name} must be a sequence, or None; it was {given!r}")
        self.joint = signals is not None
        self.signals: list[tuple[str, Target]] = []
        for pair in [(loss, target)] if signals is None else signals:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise ValueError(f"signals must be (loss, target) pairs; one was {pair!r}")
            checks.one_of("loss", pair[0], losses.LOSSES)
            _check_target(pair[1], losses.TARGETS if self.joint else (*losses.TARGETS, "contrast"))
            self.signals.append((pair[0], pair[1]))
        if not self.signals:
            raise ValueError("signals must name at least one (loss, target) pair; it was empty")
        self.contrast = not self.joint and isinstance(target, str) and target == "contrast"
        sizes = {"chunk_size": chunk_size, "memory_budget": memory_budget}
        checks.at_least(1, **{name: value for name, value in sizes.items() if value is not None})
        self.reduction, self.log, self.impl = reduction, log, impl
        self.chunk_size, self.memory_budget, self.batch_dims = chunk_size, memory_budget, batch_dims
        self.layers = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
        self._parameters()
        refuse_mixing(self.model, training=False)
        self._latest: Recorded | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the latest call, which belongs to a graph."""
        return {**self.__dict__, "_latest": None}

    @property
    def names(self) -> list[str]:
        """Names of the P parameters, in the order of ``model.named_parameters()``."""
        return list(self._parameters())

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters by name."""
        found = named_parameters(self.model)
        wanted = found
        if self.layers is not None:
            for pattern in self.layers:
                if not isinstance(pattern, str) or not any(_matches(name, pattern) for name in found):
                    raise ValueError(f"layers must name parameters or modules of the model; nothing is {pattern!r}")
            wanted = {n: p for n, p in found.items() if any(_matches(n, pattern) for pattern in self.layers)}
        if not wanted:
            raise ValueError(f"{'layers must name' if found else 'model must have'} parameters; it had none")
        return wanted

    def __call__(self, *args: Any, target: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model on a batch.

        Args:
            *args: The model's inputs; every tensor with as many rows as the first carries the batch, unless
                ``batch_dims`` says otherwise. One that is square in the batch (T by T positions, T = B) is refused.
            target: Targets of this batch instead of the extractor's: class indices ``(B,)`` or soft targets ``(B, N)``.
            **kwargs: The model's inputs by keyword.

        Returns:
            Logits ``(B, N)`` as the model gives them, and features in float32 (float64 for a float64 model):
            ``(B, P)``; ``(B, S, P)`` for S signals; ``(B, N, P)`` for ``target="contrast"``.

        Raises:
            TypeError, ValueError: For a target that is not one of the above, or a model that mixes samples.
        """
        return outside_of_compilation(self._call)(args, kwargs, target)

    def _call(self, args: Any, kwargs: Any, target: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            choose(self.impl, next(self.model.parameters()))
            args, kwargs = pytree.tree_map_only(Tensor, _detached, (args, kwargs))
            try:
                model = _evaluation_model(self.model)
            except ValueError:
                refuse_parts(self.model)  # parameters may have become parts since
                raise
            inputs = CallInputs(model.forward, args, kwargs, self.batch_dims)
            target = self._of_batch(target, inputs.samples)
            if inputs.samples == 0:
                return self._empty(model, args, kwargs)
            modules = list(model.named_modules())
            whole = bool(carried_states((module for _, module in modules), inputs.samples))
            start, chunk, parts = 0, inputs.samples if whole else self._first_chunk(inputs), []
            while start < inputs.samples:
                last = min(start + chunk, inputs.samples)
                index = None if last - start == inputs.samples else torch.arange(start, last, device="cpu")
                own = inputs.call_of(inputs.rows(index))
                of_part = target if target is None or index is None else target[start:last]
                parts.append(self._pass(model, modules, *own, of_part, part=index is not None))
                chunk = self._chunk(parts[0][2], inputs.samples - last) if start == 0 and index is not None else chunk
                start = last
            return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _of_batch(self, target: Tensor | None, samples: int) -> Tensor | None:
        """Return the targets of a call, checked as far as this is possible without logits."""
        if target is None:
            return None
        if self.contrast or self.joint:
            raise ValueError("target of a call must be left out where signals or contrasts name theirs; it was given")
        checks.is_tensor("target", target)
        # Floats in one dimension would pass for a soft target of all samples.
        if target.dim() <= target.is_floating_point() or target.shape[0] != samples:
            raise ValueError(
                f"target must have shape ({samples},) or ({samples}, N), class indices or soft targets; it was "
                f"{tuple(target.shape)} of {target.dtype}"
            )
        return _detached(target)

    def report(self) -> list[Route]:
        """Return how each parameter's norms were computed in the latest call; RuntimeError before the first call."""
        if self._latest is None:
            raise RuntimeError("a report needs one call first: it depends on what the model does with its inputs")
        return routes_of(self._latest, dict(zip(self._keys, self.names, strict=True)))

    def _pass(
        self, model: nn.Module, modules: Sequence[tuple[str, nn.Module]], args: Any, kwargs: Any, target: Tensor | None,
        *, part: bool,
    ) -> tuple[Tensor, Tensor, int]:  # fmt: skip
        """Run one forward and backward pass of an undivided batch; also return the bytes of one sample's results."""
        named = self._parameters()
        # A copy holds other parameters where those of the model were made in inference mode.
        held = named if model is self.model else named_parameters(model)
        wanted = {id(held[name]): held[name] for name in named}
        output, recorded = run(
            model, lambda own: functools.partial(_logits, own), args, kwargs, wanted, self.model, undo=True,
            modules=modules, batch_dims=self.batch_dims, counts=True, part=part,
        )  # fmt: skip
        self._latest, self._keys = recorded, list(wanted)
        try:
            logits = class_logits(output, recorded.samples)
            z = logits.detach()
            with computing_with(self.impl):
                features = signal_sqnorms(recorded, logits, self._deltas(z, target), wanted, log=self.log)
        finally:
            recorded.close()
        features = features.movedim(0, 1) if self.contrast or self.joint else features[0]
        return z, features, recorded.bytes_of_sample()

    def _deltas(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """Return the output gradients of all signals, ``(S, B, N)``, in float64 if logarithms are wanted."""
        z = logits.double() if self.log else logits
        if self.contrast:
            return losses.contrast_delta(z, loss=self.signals[0][0], reduction=self.reduction).movedim(-2, 0)
        deltas = []
        for loss, given in self.signals:
            value = _target_rows(given if target is None else target, logits)
            deltas.append(losses.delta(z, value, loss=loss, reduction=self.reduction))
        return torch.stack(deltas)

    def _first_chunk(self, inputs: CallInputs) -> int:
        """Return how many samples to take first; their bytes tell how many to take then."""
        if self.chunk_size is not None:
            return self.chunk_size
        if self.memory_budget is not None:
            return 1
        on_cpu = next(x for x in inputs.leaves if isinstance(x, Tensor)).device.type == "cpu"
        return _CPU_SAMPLES if on_cpu else inputs.samples

    def _chunk(self, bytes_of_sample: int, samples: int) -> int:
        """Return how many of the other samples to take at a time."""
        if self.chunk_size is not None:
            return self.chunk_size
        # Layer outputs stay for the backward pass, whose gradients and scratch take about as much again.
        per_sample = max(1, 2 * bytes_of_sample)
        if self.memory_budget is not None:
            return max(1, self.memory_budget // per_sample)
        chunk = max(_CPU_SAMPLES, _CPU_WORKING_SET // per_sample)
        # Pieces of equal size: a short last one would waste the most.
        return max(1, math.ceil(samples / math.ceil(max(1, samples) / chunk)))

    def _empty(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        args, kwargs = one_for_none((args, kwargs))
        snapshot = Snapshot(list(model.named_modules()), (), ())
        with torch.no_grad():
            (values, rebuilt, _), _ = ordinary.call(model, (args, kwargs), snapshot)
        snapshot.restore()
        logits = class_logits(rebuilt(values))[:0]
        middle = (logits.shape[1],) if self.contrast else (len(self.signals),) if self.joint else ()
        dtype = losses.compute_dtype(logits.dtype)
        return logits, logits.new_zeros((0, *middle, len(self.names)), dtype=dtype)


@torch.no_grad()
def signal_sqnorms(
    recorded: Recorded, output: Tensor, delta: Tensor, wanted: Mapping[int, Tensor], *, log: bool
) -> Tensor:
    """Return squared norms ``(S, B, P)`` of gradients of the wanted parameters, or logarithms, finite even for zeros.

    ``delta`` ``(S, B, N)`` holds S gradients of a call's output, in float64 for ``log``, because squares may underflow.
    """
    # If the backward pass is linear in delta, scaling delta to unit size keeps every intermediate square in range.
    scale = delta.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(delta.dtype).tiny)
    if recorded.custom_backward:
        scale = torch.ones_like(scale)
    unit = (delta / scale).to(output.dtype)
    found: dict[int, Tensor] = {}
    if output.requires_grad:
        with torch.enable_grad():
            found = squared_norms([recorded], [output], [unit], wanted, batched=True)
    zeros = unit.new_zeros(unit.shape[:2], dtype=losses.compute_dtype(delta.dtype if log else output.dtype))
    norms = torch.stack([found[key].to(zeros) if key in found else zeros for key in wanted], -1)
    if log:
        return norms.clamp_min(torch.finfo(norms.dtype).tiny).log() + (2 * scale.log()).to(norms.dtype)
    scale = scale.to(norms.dtype)
    # In this order, no intermediate product leaves the dtype's range if the result is within it.
    return norms * scale * scale


def _detached(x: Tensor) -> Tensor:
    """Return ``x`` detached, and copied if it was made in inference mode, so that a graph can use it."""
    return x.clone().detach() if x.is_inference() else x.detach()


def _evaluation_model(model: nn.Module) -> nn.Module:
    """Return ``model`` if it is in evaluation mode and a graph can use its tensors, or else such a copy."""
    for module in model.modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if module.training or any(t is not None and t.is_inference() for t in tensors):
            other = evaluation_copy(model)
            inherit_rows(model, other)
            return other
    return model


def _logits(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Call a model and return its logits; other outputs may be anything."""
    return logits_of(model(*args, **kwargs))


def _check_target(target: object, names: Sequence[str]) -> None:
    """Raise unless ``target`` is one of ``names``, or can be one target for all samples."""
    if isinstance(target, str):
        checks.one_of("target", target, names)
    elif isinstance(target, bool) or not (isinstance(target, (int, Tensor)) or callable(target)):
        raise TypeError(f"target must be a name, an index, a tensor or a function; it was {target!r}")
    elif isinstance(target, Tensor) and target.dim() > target.is_floating_point():
        raise ValueError(
            "target must be one for all samples, a class index or (N,); give those of a batch to the call, "
            f"extractor(x, target=y); it had shape {tuple(target.shape)}"
        )


def _target_rows(target: Target, logits: Tensor) -> str | Tensor:
    """Return a target for each row of ``logits``, checked before any kernel reads an index without a class."""
    value = target(logits) if callable(target) else target
    if isinstance(value, int):
        value = torch.tensor(value, device="cpu")
    if isinstance(value, Tensor):
        value = value.to(logits.device)
        # Floats that a function returns in one dimension could be one per sample.
        if value.dim() == value.is_floating_point() and not (callable(target) and value.dim()):
            value = value.expand(logits.shape[0], *value.shape)
    check_target(value, logits, wait=True)
    return value


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


__all__ = ["GradientFeatures", "Route", "logits_of"]
