"""A network with its plans: choosing routes once per structure of inputs, running forward passes with probes."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import pytree
from fastgrad.engine.fallback import floating
from fastgrad.engine.plan import SAMPLES, Plan, Planner, Route, find_layout
from fastgrad.engine.run import Run, gather
from fastgrad.engine.shadow import Shadow, attach, ordinary
from fastgrad.layers.registry import LayerRule

_PLANS_KEPT = 16


class Network:
    """Runs a model with probes; only reads it.

    Args:
        model: The user's model; held weakly.
        names: Gives the wanted parameters, name by id, in order; all by default.
        tensors: The tensors in an output whose gradients matter.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Callable[[], dict[int, str]] | None = None,
        tensors: Callable[[Any], list[Tensor]] = floating,
    ) -> None:
        self._model = weakref.ref(model)
        self.names, self.tensors = names or self._all_names, tensors
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        model = self._model()
        assert model is not None
        return model

    def _all_names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.model.named_parameters()}

    def plan(self, args: Any, kwargs: Any, samples: int) -> Plan:
        """The plan for inputs of this structure, made and checked at their first appearance.

        Raises:
            ValueError: If the model does not treat the samples of a batch independently.
        """
        names = self.names()
        key = (_structure(args, kwargs), tuple(map(id, self.model.modules())), tuple(names.items()))
        with self._lock:
            plan = self._plans.get(key)
        if plan is None:
            with torch.enable_grad():
                plan = self._make_plan(names, args, kwargs, samples)
            with self._lock:
                self._plans[key] = plan
                while len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
        return plan

    def routes(self) -> list[Route]:
        """Routes of the latest plan; RuntimeError where there is none yet."""
        with self._lock:
            if not self._plans:
                raise RuntimeError(
                    "a report needs one call first: routes depend on the structure of the inputs"
                )
            plan = next(reversed(self._plans.values()))
        return [plan.routes[name] for name in plan.names]

    def forward(
        self,
        plan: Plan,
        run: Run,
        args: Any,
        kwargs: Any,
        *,
        parameter: Callable[[nn.Parameter], Tensor] = ordinary,
        training: bool = False,
    ) -> Any:
        """One forward pass of a private copy, with the plan's probes.

        Args:
            plan: The plan for inputs of this structure.
            run: Takes up the probes.
            args: Positional inputs.
            kwargs: Inputs by keyword.
            parameter: What the copy holds in place of each parameter.
            training: Whether modules keep their own mode instead of evaluation mode.
        """
        parameters = dict(self.model.named_parameters())
        copies = {
            id(parameters[site.parameters[0]]): run.broadcast(site, parameter(parameters[site.parameters[0]]))
            for site in plan.sites
            if site.rank
        }
        shadow = Shadow(
            self.model, lambda p: copies[id(p)] if id(p) in copies else parameter(p), training=training
        )
        for site in plan.sites:
            if site.rank:
                continue
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

    def _make_plan(self, names: dict[int, str], args: Any, kwargs: Any, samples: int) -> Plan:
        index = torch.arange(SAMPLES) % samples
        three = take((args, kwargs), index, samples)
        two = take((args, kwargs), index[: SAMPLES - 1], samples)
        planner = Planner(self.model, names, {id(m): path for path, m in self.model.named_modules()})
        planner.observe(*three, *two)
        outputs = self.tensors(planner.three.output)
        found = [
            _middle_row(out, two_out)
            for out, two_out in zip(outputs, self.tensors(planner.two_output), strict=True)
        ]
        if all(row is None for row in found):
            raise ValueError(
                "model must return a floating-point tensor that carries the batch; it returned none"
            )
        rows = [
            torch.zeros_like(out) if row is None else row for out, row in zip(outputs, found, strict=True)
        ]
        truth = planner.backward(outputs, rows)
        loops: frozenset[str] = frozenset()
        forced: frozenset[str] = frozenset()
        problem = ""
        speculate = True
        for _ in range(5):
            plan = planner.plan(forced, loops, speculate=speculate)
            try:
                features = self._trial(plan, three, rows)
            except Exception as error:
                if speculate and any(site.rank for site in plan.sites):
                    speculate = False
                    continue
                vectorized = [s.path for s in plan.sites if s.rule is None and s.vectorize and not s.rank]
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
        raise ValueError(f"model must treat the samples of a batch independently, alike each time: {problem}")

    def _trial(self, plan: Plan, inputs: Any, rows: Sequence[Tensor]) -> Tensor:
        run = Run(SAMPLES)
        outputs = self.tensors(self.forward(plan, run, *inputs))
        return squared_norms(run, outputs, rows, plan.names, outputs[0].detach())


def squared_norms(
    run: Run,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    names: Sequence[str],
    like: Tensor,
    *,
    keep: bool = False,
) -> Tensor:
    """Send one set of output gradients back; ``(B, P)``. ``keep`` keeps the graph for another pass."""
    pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out.requires_grad]
    probes = [probe for _, probe in run.probes]
    if not probes or not pairs:
        return gather(run, [], names, like)
    found = torch.autograd.grad(
        [out for out, _ in pairs], probes, [g for _, g in pairs], retain_graph=keep, allow_unused=True
    )
    return gather(run, [or_zero(f, p) for f, p in zip(found, probes, strict=True)], names, like)


def batched_squared_norms(run: Run, output: Tensor, gradients: Tensor, names: Sequence[str]) -> Tensor:
    """Send S output gradients ``(S, B, ...)`` back in one batched pass; ``(S, B, P)``."""
    probes = [probe for _, probe in run.probes]
    like = output.detach()
    if not probes or not output.requires_grad:
        return gather(run, [], names, like, (gradients.shape[0],))

    def back(gradient: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(output, probes, gradient, retain_graph=True, allow_unused=True)
        return [or_zero(f, p) for f, p in zip(found, probes, strict=True)]

    return gather(run, torch.func.vmap(back)(gradients), names, like, (gradients.shape[0],))


def or_zero(gradient: Tensor | None, probe: Tensor) -> Tensor:
    """The gradient of a probe; zeros where the outputs do not depend on it."""
    return torch.zeros_like(probe) if gradient is None else gradient


def _middle_row(out: Tensor, fewer: Tensor) -> Tensor | None:
    """A fixed gradient for the middle of three samples; None for an output without the batch."""
    layout = find_layout(tuple(out.shape), tuple(fewer.shape), None)
    if layout is None or layout.kind == "single":
        return None
    rows = out.shape[layout.dim] // SAMPLES
    pattern = torch.cos(torch.arange(out.numel(), device=out.device, dtype=torch.float64) * 1.7 + 0.3)
    keep = torch.zeros(out.shape[layout.dim], device=out.device, dtype=torch.float64)
    keep[rows : 2 * rows] = 1
    shape = [1] * out.dim()
    shape[layout.dim] = -1
    return (pattern.reshape(out.shape) * keep.reshape(shape)).to(out.dtype)


def input_tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """All tensors among the inputs."""
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def batch_size(args: Any, kwargs: Any) -> int:
    """Dimension 0 of the first input tensor; ValueError if there is none."""
    for tensor in input_tensors(args, kwargs):
        if tensor.dim():
            return tensor.shape[0]
    raise ValueError("inputs must hold a tensor with the batch in dimension 0; there was none")


def take(tree: Any, index: Any, samples: int) -> Any:
    """Some samples of every tensor that carries the batch."""

    def some(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != samples:
            return t
        return t[index.to(t.device) if isinstance(index, Tensor) else index]

    return pytree.tree_map_only(Tensor, some, tree)


def _structure(args: Any, kwargs: Any) -> Any:
    """What a plan depends on: the structure of the inputs, not their sizes."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    kinds = tuple(
        (leaf.dim(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves
    )
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    return str(spec), kinds, tuple(torch.is_autocast_enabled(device) for device in sorted(devices))


def _disagreeing(plan: Plan, features: Tensor, truth: dict[str, Tensor]) -> frozenset[str]:
    """Parameters whose squared norms are not those of the middle sample's true gradient."""
    dtype, zero = features.dtype, features.new_zeros(())
    true = torch.stack(
        [truth[name].to(dtype).square().sum() if name in truth else zero for name in plan.names]
    )
    precision = max((torch.finfo(g.dtype).eps for g in truth.values()), default=torch.finfo(dtype).eps)
    # A wrong route is wrong by a factor; this is no test of accuracy. Gradients that vanish in exact arithmetic
    # (an attention's key bias) are rounding errors of the largest.
    tolerance = min(0.5, 1e4 * precision) if precision > 1e-6 else 1e-2
    floor = (1e3 * precision) ** 2 * true.max()
    expected = torch.zeros_like(features)
    expected[1] = true
    wrong = ~((features - expected).abs() <= tolerance * expected + floor).all(0)
    return frozenset(name for name, bad in zip(plan.names, wrong.tolist(), strict=True) if bad)
