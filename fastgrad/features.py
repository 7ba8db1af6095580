"""Whole-network gradient features: logits and squared gradient norms in one call."""

from __future__ import annotations

import fnmatch
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastgrad import losses
from fastgrad.checks import is_bool, one_of
from fastgrad.layers.plan import SAMPLES, Plan, Planner, Route, Site, refuse_mixing
from fastgrad.layers.registry import LayerRule
from fastgrad.layers.run import Run, gather
from fastgrad.layers.shadow import Shadow, attach, ordinary

#: A fixed target by name, one class index or soft target for all samples, or a function of the logits.
Target = str | int | Tensor | Callable[[Tensor], Tensor]
_PLANS_KEPT = 16


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, ``.logits``, ``["logits"]``, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"model must return logits as a tensor, as .logits, or first in a tuple; it returned {type(output).__name__}"
        )
    return found


class GradientFeatures:
    """Squared L2 norms of the gradient of every parameter, for every sample, from one backward pass.

    The model itself is only read: each call runs a private copy of its module tree (in evaluation mode, sharing
    its tensors), so training mode, ``requires_grad``, ``.grad`` and hooks stay as they are, frozen parameters
    get features all the same, and several threads may use one model.

    The first call on a new structure of inputs watches the model on three of the samples to choose a route for
    each parameter, and compares the result with autograd once.

    Args:
        model: Maps a batch to logits ``(B, N)``; see `logits_of` for the kinds of outputs it may have.
        loss: ``"cross_entropy"``, ``"bce"``, ``"mse"`` or ``"brier"``.
        target: ``"ones"``, ``"uniform"``, ``"predicted"``; ``"contrast"`` for every class in turn; a class index
            or a soft target ``(N,)`` for all samples; or a function from logits ``(B, N)`` to targets, ``(B,)``
            class indices or ``(B, N)``.
        reduction: ``"sum"`` or ``"mean"`` over classes.
        signals: Several ``(loss, target)`` pairs in place of ``loss`` and ``target``: one forward and one batched
            backward pass.
        layers: Only these parameters: names or shell patterns of parameters, or names of modules; None for all.
        log: Natural logarithms of the norms, finite also where the norms underflow or vanish.
        chunk_size: Samples at a time; None for the whole batch.
        memory_budget: Bytes a call may add, from which the chunk size is estimated if ``chunk_size`` is None.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``, for the layers that have kernels.

    Raises:
        TypeError, ValueError: For an argument that is not one of the above, or a model that mixes samples.
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; it was {type(model).__name__}")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("model must be an ordinary torch.nn.Module; it was a torch.jit.ScriptModule")
        compiled = getattr(model, "_orig_mod", None)
        self.model: nn.Module = compiled if isinstance(compiled, nn.Module) else model
        one_of("loss", loss, losses.LOSSES)
        one_of("reduction", reduction, ("sum", "mean"))
        one_of("impl", impl, ("auto", "triton", "eager"))
        is_bool("log", log)
        self.contrast = signals is None and isinstance(target, str) and target == "contrast"
        self.joint = signals is not None
        pairs = [(loss, target)] if signals is None else list(signals)
        if not pairs:
            raise ValueError("signals must name at least one (loss, target) pair; it was empty")
        self.signals: list[tuple[str, Target]] = []
        for pair in pairs:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise ValueError(f"signals must be (loss, target) pairs; one was {pair!r}")
            one_of("loss", pair[0], losses.LOSSES)
            if isinstance(pair[1], str) and not self.contrast:
                one_of("target", pair[1], losses.TARGETS if self.joint else (*losses.TARGETS, "contrast"))
            elif not isinstance(pair[1], (str, int, Tensor)) and not callable(pair[1]):
                raise TypeError(
                    f"target must be a name, an index, a tensor or a function; it was {pair[1]!r}"
                )
            self.signals.append((pair[0], pair[1]))
        for name, value in (("chunk_size", chunk_size), ("memory_budget", memory_budget)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None; it was {value!r}")
        self.reduction, self.log, self.impl = reduction, log, impl
        self.chunk_size, self.memory_budget = chunk_size, memory_budget
        self.layers = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
        self._names()
        refuse_mixing(self.model, training=False)
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of the P parameters, in the order of ``model.named_parameters()``."""
        return list(self._names().values())

    def _names(self) -> dict[int, str]:
        found = {id(p): name for name, p in self.model.named_parameters()}
        if self.layers is None:
            wanted = found
        else:
            for pattern in self.layers:
                if not any(_matches(name, pattern) for name in found.values()):
                    raise ValueError(
                        f"layers must name parameters or modules of the model; nothing is {pattern!r}"
                    )
            wanted = {i: n for i, n in found.items() if any(_matches(n, pattern) for pattern in self.layers)}
        if not wanted:
            raise ValueError("model must have parameters; it had none")
        return wanted

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model on a batch.

        Args:
            *args: The model's inputs; every tensor whose dimension 0 equals that of the first is a batch.
            **kwargs: Likewise.

        Returns:
            Logits ``(B, N)`` as the model gives them, and features in float32 (float64 for a float64 model):
            ``(B, P)``; ``(B, S, P)`` for S signals; ``(B, N, P)`` for ``target="contrast"``.
        """
        with torch.inference_mode(False):
            args, kwargs = pytree.tree_map_only(Tensor, ordinary, (args, kwargs))
            samples = _batch_size(args, kwargs)
            if samples == 0:
                return self._empty(args, kwargs)
            plan = self._plan(args, kwargs, samples)
            chunk = self._chunk(plan, args, kwargs, samples)
            if chunk is None:
                return self._extract(plan, args, kwargs, samples)
            parts = []
            for start in range(0, samples, chunk):
                index = slice(start, min(start + chunk, samples))
                part_args, part_kwargs = _take((args, kwargs), index, samples)
                parts.append(self._extract(plan, part_args, part_kwargs, index.stop - start))
            return torch.cat([logits for logits, _ in parts]), torch.cat([f for _, f in parts])

    def report(self) -> list[Route]:
        """The route taken for each parameter and why, as chosen by the latest call on a new input structure.

        Raises:
            RuntimeError: Before the first call.
        """
        with self._lock:
            if not self._plans:
                raise RuntimeError(
                    "report needs one call of the extractor first: routes depend on the inputs"
                )
            plan = next(reversed(self._plans.values()))
        return [plan.routes[name] for name in plan.names]

    def _extract(
        self,
        plan: Plan,
        args: Any,
        kwargs: Any,
        samples: int,
        deltas: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        run = Run(samples)
        with torch.enable_grad():
            output = self._forward(plan, run, args, kwargs)
            logits = logits_of(output)
            _check_logits(logits, samples)
            z = logits.detach()
            delta = deltas(z) if deltas is not None else self._deltas(z)
            # The backward pass is linear in delta: a unit-sized one keeps every intermediate square in range.
            scale = delta.abs().amax(-1, keepdim=True)
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            features = self._backward(run, logits, (delta / scale).to(logits.dtype), plan.names)
        scale = scale.to(features.dtype)
        if self.log:
            features = features.clamp_min(torch.finfo(features.dtype).tiny).log() + 2 * scale.log()
        else:
            features = features * scale.square()
        return z, features.movedim(0, 1) if self.contrast or self.joint else features[0]

    def _forward(self, plan: Plan, run: Run, args: Any, kwargs: Any) -> Any:
        shadow = Shadow(self.model)
        parameters = {name: p for name, p in self.model.named_parameters()}
        for site in plan.sites:
            original = self.model.get_submodule(site.path)
            copy = shadow.modules[id(original)]
            if isinstance(site.rule, LayerRule):
                attach(copy, run.layer_hook(site, site.rule))
            else:
                before, after = run.replay_hooks(
                    site, original, [parameters[name] for name in site.parameters]
                )
                attach(copy, before, before=True)
                attach(copy, after)
        return shadow.root(*args, **kwargs)

    def _backward(self, run: Run, logits: Tensor, deltas: Tensor, names: Sequence[str]) -> Tensor:
        """``(S, B, N)`` output gradients to ``(S, B, P)`` squared norms."""
        signals = deltas.shape[0]
        probes = [probe for _, probe in run.probes]
        if not probes or not logits.requires_grad:
            return gather(run, [], names, logits.detach(), (signals,))
        if signals == 1:
            found = torch.autograd.grad(logits, probes, deltas[0], allow_unused=True)
            found = [_or_zero(f, p).unsqueeze(0) for f, p in zip(found, probes, strict=True)]
        else:

            def back(delta: Tensor) -> list[Tensor]:
                grads = torch.autograd.grad(logits, probes, delta, retain_graph=True, allow_unused=True)
                return [_or_zero(f, p) for f, p in zip(grads, probes, strict=True)]

            found = torch.func.vmap(back)(deltas)
        return gather(run, found, names, logits.detach(), (signals,))

    def _deltas(self, logits: Tensor) -> Tensor:
        """Output gradients of all signals, ``(S, B, N)``."""
        if self.contrast:
            return losses.contrast_delta(logits, loss=self.signals[0][0], reduction=self.reduction).movedim(
                -2, 0
            )
        deltas = []
        for loss, target in self.signals:
            value: str | Tensor
            if callable(target):
                value = target(logits)
            elif isinstance(target, int):
                value = torch.full(logits.shape[:-1], target, dtype=torch.long, device=logits.device)
            elif isinstance(target, Tensor):
                value = target.to(logits.device)
                value = value.expand(logits.shape if value.is_floating_point() else logits.shape[:-1])
            else:
                value = target
            deltas.append(losses.delta(logits, value, loss=loss, reduction=self.reduction))
        return torch.stack(deltas)

    def _plan(self, args: Any, kwargs: Any, samples: int) -> Plan:
        key = (_structure(args, kwargs), tuple(map(id, self.model.modules())), tuple(self._names().items()))
        with self._lock:
            plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(args, kwargs, samples)
            with self._lock:
                self._plans[key] = plan
                while len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
        return plan

    def _make_plan(self, args: Any, kwargs: Any, samples: int) -> Plan:
        index = torch.arange(SAMPLES) % samples
        three = _take((args, kwargs), index, samples)
        two = _take((args, kwargs), index[: SAMPLES - 1], samples)
        planner = Planner(self.model, self._names(), {id(m): path for path, m in self.model.named_modules()})
        planner.observe(*three, *two)
        logits = logits_of(planner.three.output)
        _check_logits(logits, SAMPLES)
        delta = torch.cos(torch.arange(logits.shape[1], device=logits.device) * 1.7 + 0.3).to(logits.dtype)
        row = torch.zeros_like(logits)
        row[1] = delta
        truth = planner.backward([logits], [row])
        loops: frozenset[str] = frozenset()
        forced: frozenset[str] = frozenset()
        problem = ""
        for _ in range(3):
            plan = planner.plan(forced, loops)
            try:
                _, features = self._trial(plan, three, row)
            except Exception as error:
                vectorized = [s.path for s in plan.sites if s.rule is None and s.vectorize]
                if not vectorized:
                    raise
                problem, loops = str(error), loops | frozenset(vectorized)
                continue
            wrong = _disagreeing(plan, features, truth)
            if not wrong:
                return plan
            problem = f"squared norms of {', '.join(sorted(wrong))} disagree with autograd"
            if wrong <= forced:
                break
            forced = forced | wrong
        raise ValueError(
            f"model must treat the samples of a batch independently and alike each time: {problem}"
        )

    def _trial(self, plan: Plan, inputs: Any, row: Tensor) -> tuple[Tensor, Tensor]:
        run = Run(SAMPLES)
        with torch.enable_grad():
            logits = logits_of(self._forward(plan, run, *inputs))
            return logits, self._backward(run, logits, row.unsqueeze(0), plan.names)[0]

    def _chunk(self, plan: Plan, args: Any, kwargs: Any, samples: int) -> int | None:
        chunk = self.chunk_size
        if chunk is None and self.memory_budget is not None:
            elements = sum(t.numel() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            # Layer outputs stay for the backward pass, whose gradients and scratch take about as much again.
            per_sample = 2 * plan.bytes_per_element * elements / samples
            chunk = max(1, int(self.memory_budget / max(1.0, per_sample)))
        return None if chunk is None or chunk >= samples else chunk

    def _empty(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
        one = pytree.tree_map_only(
            Tensor,
            lambda t: t.new_zeros((1, *t.shape[1:])) if t.dim() and t.shape[0] == 0 else t,
            (args, kwargs),
        )
        with torch.no_grad():
            logits = logits_of(Shadow(self.model).root(*one[0], **one[1]))[:0]
        middle = (logits.shape[1],) if self.contrast else (len(self.signals),) if self.joint else ()
        dtype = losses.compute_dtype(logits.dtype)
        return logits, logits.new_zeros((0, *middle, len(self._names())), dtype=dtype)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)


def _or_zero(gradient: Tensor | None, probe: Tensor) -> Tensor:
    return torch.zeros_like(probe) if gradient is None else gradient


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _batch_size(args: Any, kwargs: Any) -> int:
    tensors = [t for t in _tensors(args, kwargs) if t.dim()]
    if not tensors:
        raise ValueError("inputs must hold a tensor with the batch in dimension 0; there was none")
    return tensors[0].shape[0]


def _take(tree: Any, index: Any, samples: int) -> Any:
    """Some samples of every tensor that carries the batch."""

    def take(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != samples:
            return t
        return t[index.to(t.device) if isinstance(index, Tensor) else index]

    return pytree.tree_map_only(Tensor, take, tree)


def _structure(args: Any, kwargs: Any) -> Any:
    """What a plan depends on: the structure of the inputs, not their sizes."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    kinds = tuple(
        (leaf.dim(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves
    )
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    return str(spec), kinds, tuple(torch.is_autocast_enabled(device) for device in sorted(devices))


def _check_logits(logits: Tensor, samples: int) -> None:
    if logits.dim() != 2 or logits.shape[0] != samples or not logits.is_floating_point():
        raise ValueError(
            f"model must return logits of shape (B, N) with B = {samples}; it returned {tuple(logits.shape)}, "
            f"{logits.dtype}"
        )


def _disagreeing(plan: Plan, features: Tensor, truth: dict[str, Tensor]) -> frozenset[str]:
    """Parameters whose squared norms are not those of the middle sample's true gradient."""
    dtype = features.dtype
    true = torch.stack(
        [
            truth[name].to(dtype).square().sum()
            if name in truth
            else torch.zeros((), dtype=dtype, device=features.device)
            for name in plan.names
        ]
    )
    precision = max((torch.finfo(g.dtype).eps for g in truth.values()), default=torch.finfo(dtype).eps)
    # A wrong route is wrong by a factor; this is no test of accuracy. Gradients that vanish in exact arithmetic
    # (an attention's key bias) are rounding errors of the largest.
    tolerance = min(0.5, 1e4 * precision) if precision > 1e-6 else 1e-2
    floor = (1e3 * precision) ** 2 * true.max()
    expected = torch.zeros_like(features)
    expected[1] = true
    wrong = ((features - expected).abs() > tolerance * expected + floor).any(0)
    return frozenset(name for name, bad in zip(plan.names, wrong.tolist(), strict=True) if bad)


__all__ = ["GradientFeatures", "Route", "Site", "logits_of"]
