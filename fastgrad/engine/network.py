"""A network with its plans: choosing routes once per structure of inputs, running forward passes with probes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import attend_alike, pytree
from fastgrad.batches import take
from fastgrad.engine.backward import gather, pull
from fastgrad.engine.fallback import floating
from fastgrad.engine.layout import SAMPLES, find_layout, middle_row
from fastgrad.engine.memory import keep_freed_memory
from fastgrad.engine.observing import Observation
from fastgrad.engine.planning import Caution, Plan, Planner, Route
from fastgrad.engine.replayed import NotRepeatableError
from fastgrad.engine.run import Reading, Run, Site, random_states, set_random_states
from fastgrad.engine.shadow import Shadow, ordinary

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
        keep_freed_memory()

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        model = self._model()
        assert model is not None
        return model

    def _all_names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.model.named_parameters()}

    def plan(self, args: Any, kwargs: Any, samples: int, *, training: bool = False) -> Plan:
        """The plan for inputs of this structure, made and checked at their first appearance.

        Args:
            args: Positional inputs.
            kwargs: Inputs by keyword.
            samples: B.
            training: Whether modules will keep their own mode instead of evaluation mode.

        Raises:
            ValueError: If the model does not treat the samples of a batch independently, or not alike each time.
        """
        names, modules = self.names(), list(self.model.modules())
        modes = tuple(module.training and training for module in modules)
        key = (_structure(args, kwargs), tuple(map(id, modules)), tuple(names.items()), modes)
        with self._lock:
            plan = self._plans.get(key)
        if plan is None:
            with torch.enable_grad():
                plan = self._make_plan(names, args, kwargs, samples, training=any(modes))
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
        plan: Plan | None,
        run: Run,
        args: Any,
        kwargs: Any,
        *,
        sites: Sequence[Site] = (),
        readings: Sequence[Reading] = (),
        parameter: Callable[[nn.Parameter], Tensor] = ordinary,
        training: bool = False,
    ) -> Any:
        """One forward pass of a private copy, with probes and readings.

        Args:
            plan: The plan for inputs of this structure; None for a pass without its sites, which needs no
                observation and no trial.
            run: Takes up the probes and readings.
            args: Positional inputs.
            kwargs: Inputs by keyword.
            sites: Further places where numbers are to leave the backward pass; any site turns gradients on.
            readings: What to keep of what modules see.
            parameter: What the copy holds in place of each parameter.
            training: Whether modules keep their own mode instead of evaluation mode.

        Raises:
            RuntimeError: If a module that was to be read was not called.
        """
        shadow = Shadow(self.model, parameter, training=training)
        if not training:
            for copy in shadow.modules.values():
                attend_alike(copy)
        # Of two hooks on a module the one attached later runs earlier. The plan's may replace what autograd recorded
        # of a layer, so they come before other sites; readings come first of all, to read what the module returned.
        tapped: tuple[Site, ...] = (*sites, *(() if plan is None else plan.sites))
        places: tuple[Site | Reading, ...] = (*tapped, *readings)
        with torch.set_grad_enabled(bool(tapped) or torch.is_grad_enabled()):
            for place in places:
                place.attach(run, shadow)
            output = shadow.root(*args, **kwargs)
        for reading in readings:
            if reading not in run.readings:
                raise RuntimeError(f"the forward pass did not call {reading.path!r}, which was to be read")
        return output

    def _make_plan(
        self, names: dict[int, str], args: Any, kwargs: Any, samples: int, *, training: bool
    ) -> Plan:
        index = torch.arange(SAMPLES) % samples
        three = take((args, kwargs), index, samples)
        two = take((args, kwargs), index[: SAMPLES - 1], samples)
        with_two = Observation(self.model, two)
        observation = Observation(self.model, three, with_two)
        planner = Planner(observation, names)
        if training:
            # What may be used is planned in evaluation mode, which skips no layer by chance. Whether it holds is seen
            # in the mode that will run, with the same random numbers as the trial.
            with _undone(self.model):
                with_two = Observation(self.model, two, training=True)
            with _undone(self.model):
                observation = Observation(self.model, three, training=True)
        outputs, fewer = self.tensors(observation.output), self.tensors(with_two.output)
        found = [middle_row(out, two_out) for out, two_out in zip(outputs, fewer, strict=True)]
        if all(row is None for row in found):
            raise ValueError(
                "model must return a floating-point tensor that carries the batch; it returned none"
            )
        rows = [
            torch.zeros_like(out) if row is None else row for out, row in zip(outputs, found, strict=True)
        ]
        truth = observation.backward(outputs, rows)
        caution: Caution | None = Caution()
        # Each turn gives up more of what may fail, of which there is finitely much.
        while caution is not None:
            plan = planner.plan(caution)
            try:
                with _undone(self.model) if training else contextlib.nullcontext():
                    features = self._trial(plan, three, rows, training=training)
            except NotRepeatableError:
                raise
            except Exception:
                # Whatever a model raises that is given one copy of a parameter per sample, or mapped over samples.
                caution = caution.after_error(plan)
                if caution is None:
                    raise
                continue
            wrong = _disagreeing(plan, features, truth)
            if not wrong:
                layouts = (
                    find_layout(tuple(out.shape), tuple(two_out.shape), None)
                    for out, two_out in zip(outputs, fewer, strict=True)
                )
                return replace(plan, outputs=tuple(layouts))
            caution = caution.after_disagreement(wrong)
        raise ValueError(
            "model must treat the samples of a batch independently, alike each time: squared norms of "
            f"{', '.join(sorted(wrong))} disagree with autograd"
        )

    def _trial(self, plan: Plan, inputs: Any, rows: Sequence[Tensor], *, training: bool) -> Tensor:
        """Squared norms ``(3, P)`` as the plan finds them."""
        run = Run(SAMPLES)
        outputs = self.tensors(self.forward(plan, run, *inputs, training=training))
        pairs = [(out, row) for out, row in zip(outputs, rows, strict=True) if out.requires_grad]
        probes = [probe for _, probe in run.probes] if pairs else []
        norms = pull([out for out, _ in pairs], probes, [row for _, row in pairs])
        found = [
            (torch.zeros_like(probe) if value is None else value).unsqueeze(0)
            for probe, value in zip(probes, norms, strict=True)
        ]
        return gather(run.probes[: len(found)], found, plan.names, outputs[0].detach()[None], SAMPLES)[0]


@contextlib.contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Take back the random numbers that a forward pass in training mode draws, and what it does to buffers."""
    states = random_states(model)
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        set_random_states(model, states)
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


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
