"""A network with its plans: choosing routes once per path that it takes, running forward passes with probes."""

from __future__ import annotations

import enum
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import attend_alike, is_traced, pytree
from fastgrad.batches import take
from fastgrad.engine.backward import order_by_parameter, probe_grads
from fastgrad.engine.carriers import find_carriers
from fastgrad.engine.fallback import floating
from fastgrad.engine.layout import CHOSEN, SAMPLES, find_layout, probe_cotangent
from fastgrad.engine.memory import keep_freed_memory
from fastgrad.engine.observing import Observation
from fastgrad.engine.planning import Caution, Plan, Planner, Route
from fastgrad.engine.run import OffPlanError, Reading, Run, Site
from fastgrad.engine.shadow import Shadow, ordinary
from fastgrad.engine.state import NotRepeatableError, Snapshot, Versions, devices_of, undone
from fastgrad.engine.steps import Steps

#: Structures of inputs whose plans are kept, and plans kept for one: paths that no single plan serves.
_STRUCTURES_KEPT = 16
_PLANS_KEPT = 4


@dataclass(eq=False)
class Known:
    """What is known of a model for inputs of one structure.

    Attributes:
        training: Whether a module runs in training mode.
        names: The wanted parameters, names by id.
        modules: The model's modules. As long as they and its parameters live, their ids are theirs.
        parameters: Its parameters.
        carriers: For each leaf of the inputs, whether it carries the batch.
        devices: Those beside the CPU on which the model may draw random numbers.
        plans: Most recently used first.
    """

    training: bool
    names: dict[int, str]
    modules: list[weakref.ref[nn.Module]]
    parameters: list[weakref.ref[nn.Parameter]]
    carriers: tuple[bool, ...]
    devices: list[torch.device]
    plans: list[Plan] = field(default_factory=list)

    def lives(self) -> bool:
        """Whether no module and no parameter is gone, whose id another one may have now."""
        return all(ref() is not None for ref in self.modules) and all(
            ref() is not None for ref in self.parameters
        )


class Network:
    """Runs a model with probes; only reads it.

    Args:
        model: The user's model; held weakly.
        names: Gives the wanted parameters, name by id, in order; all by default.
        tensors: The tensors in an output whose gradients matter.
        shared: Whether passes use the user's own parameters, which a trial has copies of.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Callable[[], dict[int, str]] | None = None,
        tensors: Callable[[Any], list[Tensor]] = floating,
        *,
        shared: bool = False,
    ) -> None:
        self._model = weakref.ref(model)
        self.names, self.tensors, self.shared = names or self._all_names, tensors, shared
        self._known: OrderedDict[Any, Known] = OrderedDict()
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
        known = self._structure(args, kwargs, samples, training=training)
        with self._lock:
            if known.plans:
                return known.plans[0]
        plan = self._make_plan(known, args, kwargs, samples)
        self._keep(plan)
        return plan

    def routes(self) -> list[Route]:
        """Routes of the latest plan; RuntimeError where there is none yet."""
        with self._lock:
            plans = [plan for known in reversed(self._known.values()) for plan in known.plans]
        if not plans:
            raise RuntimeError("a report needs one call first: routes depend on the structure of the inputs")
        return [plans[0].routes[name] for name in plans[0].names]

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

        Where the pass leaves its plan, another plan is taken or made, and the pass begins again.

        Args:
            plan: The plan for inputs of this structure; None for a pass without its sites, which needs no
                observation and no trial.
            run: Takes up the probes and readings, and the plan that the pass kept to.
            args: Positional inputs.
            kwargs: Inputs by keyword.
            sites: Further places where numbers are to leave the backward pass; any site turns gradients on.
            readings: What to keep of what modules see.
            parameter: What the copy holds in place of each parameter.
            training: Whether modules keep their own mode instead of evaluation mode.

        Raises:
            RuntimeError: If a module that was to be read was not called.
            ValueError: If no plan holds for the path that the pass takes.
        """
        known = None if plan is None else plan.known
        before = None
        if known is not None:
            modules = [module for ref in known.modules if (module := ref()) is not None]
            before = Snapshot(modules, known.devices, training=training)
        inputs = Versions([leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
        tried: list[Plan] = []
        # The few samples that a plan is tried on may take another path than the batch.
        attempts = iter(() if plan is None else (SAMPLES, run.samples + 1, max(2, run.samples)))
        while True:
            reason = "calls other functions, or on other parameters, than when it was planned"
            output, shadow, raised = None, None, None
            try:
                output, shadow = self._pass(
                    plan, run, args, kwargs, sites, readings, parameter, training=training
                )
            except OffPlanError:
                pass
            except Exception as error:
                if plan is None or not plan.replaces or is_traced():
                    raise
                raised = error
                # It may be that the model does not bear what the plan gives it in place of a parameter.
                run.left = run.left or OffPlanError((), f"raises {type(error).__name__}: {error}")
            if run.left is not None:
                reason = run.left.reason
            elif plan is None or run.steps is None or run.steps.path() in plan.paths:
                if plan is not None:
                    self._keep(plan)
                if parameter is not ordinary and shadow is not None:
                    shadow.write_back()
                return output
            assert plan is not None
            assert known is not None
            assert before is not None
            if is_traced():
                raise ValueError(
                    f"model must take the path of an ordinary call while its graph is recorded; it {reason}"
                )
            before.restore()
            if inputs.modified():
                raise ValueError(
                    f"model must not write to its inputs in a call whose path was not seen before; it {reason}. Make "
                    "the same call again with the inputs as they were"
                )
            tried.append(plan)
            following = next((other for other in known.plans if all(other is not one for one in tried)), None)
            while following is None:
                count = next(attempts, None)
                if count is None:
                    if raised is not None:
                        raise raised
                    raise ValueError(
                        "model must take the same path each time it is given the same inputs; a call that was planned "
                        f"on its own {run.samples} samples {reason}"
                    )
                made = self._make_plan(known, args, kwargs, run.samples, count, older=tried[0])
                following = next((other for other in tried if other == made), made)
                if following is not made:
                    grown = not made.paths <= following.paths
                    following.paths.update(made.paths)
                    following = following if grown else None
            plan = following

    def _pass(
        self,
        plan: Plan | None,
        run: Run,
        args: Any,
        kwargs: Any,
        sites: Sequence[Site],
        readings: Sequence[Reading],
        parameter: Callable[[nn.Parameter], Tensor],
        *,
        training: bool,
    ) -> tuple[Any, Shadow]:
        """One try at a forward pass; its output and the copy that ran."""
        run.begin(plan)
        shadow = Shadow(self.model, parameter, training=training)
        if not training:
            for copy in shadow.modules.values():
                attend_alike(copy)
        # Of two hooks on a module the one attached later runs earlier. The plan's may replace what autograd recorded
        # of a layer, so they come before other sites; readings come first of all, to read what the module returned.
        tapped: tuple[Site, ...] = (*sites, *(() if plan is None else plan.sites))
        places: tuple[Site | Reading, ...] = (*tapped, *readings)
        with torch.set_grad_enabled(plan is not None or bool(tapped) or torch.is_grad_enabled()):
            for place in places:
                place.attach(run, shadow)
            if plan is None or is_traced():
                output = shadow.root(*args, **kwargs)
            else:
                with Steps(shadow.stand_ins(apart=not self.shared)) as run.steps:
                    output = shadow.root(*args, **kwargs)
        run.closed = True
        for reading in readings:
            if reading not in run.readings and run.left is None:
                raise RuntimeError(f"the forward pass did not call {reading.path!r}, which was to be read")
        return output, shadow

    def _structure(self, args: Any, kwargs: Any, samples: int, *, training: bool) -> Known:
        """What is known for inputs of this structure, and of a model with these modules and modes."""
        names, modules = self.names(), list(self.model.modules())
        modes = tuple(module.training and training for module in modules)
        key = (_kind(args, kwargs, samples), tuple(map(id, modules)), tuple(names.items()), modes)
        with self._lock:
            known = self._known.get(key)
            if known is not None and known.lives():
                self._known.move_to_end(key)
                return known
        known = Known(
            any(modes),
            names,
            list(map(weakref.ref, modules)),
            list(map(weakref.ref, self.model.parameters())),
            find_carriers(self.model, args, kwargs, samples, self.tensors, training=any(modes)),
            devices_of(self.model),
        )
        with self._lock:
            self._known[key] = known
            while len(self._known) > _STRUCTURES_KEPT:
                self._known.popitem(last=False)
        return known

    def _keep(self, plan: Plan) -> None:
        """Have ``plan`` be the first to be tried."""
        known = plan.known
        assert known is not None
        if not known.plans or known.plans[0] is not plan:
            with self._lock:
                known.plans[:] = [plan, *(other for other in known.plans if other is not plan)][:_PLANS_KEPT]

    def _make_plan(
        self,
        known: Known,
        args: Any,
        kwargs: Any,
        samples: int,
        count: int = SAMPLES,
        *,
        older: Plan | None = None,
    ) -> Plan:
        """A plan that agreed with autograd on a few samples of the inputs.

        Args:
            known: What is known of the model for inputs of this structure.
            args: Positional inputs.
            kwargs: Inputs by keyword.
            samples: B.
            count: How many of them to take; the first ones again where there are fewer.
            older: A plan that serves parameters which the new path does not use.

        Raises:
            ValueError: If the model does not treat the samples of a batch independently, or not alike each time.
        """
        index = torch.arange(count) % samples
        inputs = pytree.tree_map_only(Tensor, ordinary, (args, kwargs))
        more, less = (take(inputs, i, samples, known.carriers) for i in (index, index[:-1]))
        training = known.training
        with torch.enable_grad():
            with undone(self.model):
                fewer = Observation(self.model, less, count - 1)
            with undone(self.model):
                observation = Observation(self.model, more, count, fewer)
            planners = [Planner(observation, known.names)]
            if training:
                # What may be used is planned in evaluation mode, which skips no layer by chance. Whether it holds is
                # seen in the mode that will run, with the same random numbers as the trial.
                with undone(self.model):
                    fewer = Observation(self.model, less, count - 1, training=True)
                with undone(self.model):
                    observation = Observation(self.model, more, count, fewer, training=True)
                planners.append(Planner(observation, known.names))
            outputs, at_less = self.tensors(observation.output), self.tensors(fewer.output)
            pairs = list(zip(outputs, at_less, strict=True))
            if all(probe_cotangent(out, other, count, 0) is None for out, other in pairs):
                raise ValueError(
                    "model must return a floating-point tensor that carries the batch; it returned none"
                )
            # The chosen sample first, whose gradient shows where modules have the batch; others as long as a parameter
            # is left that none of them has a gradient of, beyond rounding.
            checks: list[tuple[int, list[Tensor], dict[str, Tensor]]] = []
            idle = {name for name, p in observation.parameters.items() if p.requires_grad} & set(
                known.names.values()
            )
            order = (CHOSEN, *(i for i in range(min(count, SAMPLES)) if i != CHOSEN))
            for chosen in order:
                rows = [
                    torch.zeros_like(out) if row is None else row
                    for out, other in pairs
                    for row in [probe_cotangent(out, other, count, chosen)]
                ]
                # A checkpoint runs a part of the model again.
                with undone(self.model):
                    truth = observation.backward(outputs, rows)
                checks.append((chosen, rows, truth))
                floor = _floor(truth)
                idle -= {name for name, gradient in truth.items() if bool(gradient.square().sum() > floor)}
                if count >= SAMPLES and not any(observation.uses[name] for name in idle):
                    break
            layouts = tuple(
                find_layout(tuple(out.shape), tuple(other.shape), None, count)
                for out, other in zip(outputs, at_less, strict=True)
            )
            caution: Caution | None = Caution()
            # Each turn gives up more of what may fail, of which there is finitely much.
            while caution is not None:
                plan = planners[0].plan(caution)
                for planner in planners[1:]:
                    unused = [name for name in plan.names if plan.routes[name].route == "zero"]
                    plan = plan.joined(planner.plan(caution, unused))
                plan = replace(plan, outputs=layouts, known=known, paths=set())
                plan = plan if older is None else plan.joined(older)
                wrong: frozenset[str] = frozenset()
                try:
                    for chosen, rows, truth in checks:
                        with undone(self.model):
                            features = self._trial(plan, more, count, rows, training=training)
                        wrong |= _disagreeing(plan, features, truth, chosen)
                except NotRepeatableError:
                    raise
                except OffPlanError as error:
                    wrong = frozenset(error.parameters)
                except Exception:
                    # Whatever a model raises that is given one copy of a parameter per sample, or mapped over samples.
                    if older is not None:
                        older = None
                        continue
                    caution = caution.after_error(plan)
                    if caution is None:
                        raise
                    continue
                if not wrong:
                    return plan
                if older is not None:
                    older = None
                    continue
                caution = caution.after_disagreement(wrong)
        raise ValueError(
            "model must treat the samples of a batch independently, alike each time: squared norms of "
            f"{', '.join(sorted(wrong))} disagree with autograd"
        )

    def _trial(
        self, plan: Plan, inputs: Any, samples: int, rows: Sequence[Tensor], *, training: bool
    ) -> Tensor:
        """Squared norms ``(B, P)`` as the plan finds them."""
        run = Run(samples)
        output, _ = self._pass(plan, run, inputs[0], inputs[1], (), (), ordinary, training=training)
        if run.left is not None:
            raise run.left
        assert run.steps is not None
        plan.paths.add(run.steps.path())
        outputs = self.tensors(output)
        pairs = [(out, row) for out, row in zip(outputs, rows, strict=True) if out.requires_grad]
        probes = [probe for _, probe in run.probes] if pairs else []
        norms = probe_grads([out for out, _ in pairs], probes, [row for _, row in pairs])
        found = [
            (torch.zeros_like(probe) if value is None else value).unsqueeze(0)
            for probe, value in zip(probes, norms, strict=True)
        ]
        return order_by_parameter(
            run.probes[: len(found)], found, plan.names, outputs[0].detach()[None], samples
        )[0]


def _kind(args: Any, kwargs: Any, samples: int) -> Any:
    """What a plan depends on: the structure of the inputs, not their sizes; switches, not numbers."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    kinds = tuple(
        (leaf.dim(), leaf.dtype, leaf.device, leaf.dim() > 0 and bool(leaf.shape[0] == samples))
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, (bool, str, enum.Enum, type(None)))
        else type(leaf)
        for leaf in leaves
    )
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    return str(spec), kinds, tuple(torch.is_autocast_enabled(device) for device in sorted(devices))


def _disagreeing(plan: Plan, features: Tensor, truth: dict[str, Tensor], chosen: int) -> frozenset[str]:
    """Parameters whose squared norms are not those of the chosen sample's true gradient, and of no other."""
    dtype, zero = features.dtype, features.new_zeros(())
    true = torch.stack(
        [truth[name].to(dtype).square().sum() if name in truth else zero for name in plan.names]
    )
    # A wrong route is wrong by a factor; this is no test of accuracy.
    precision = _precision(truth)
    tolerance = min(0.5, 1e4 * precision) if precision > 1e-6 else 1e-2
    floor = _floor(truth)
    expected = torch.zeros_like(features)
    expected[chosen] = true
    wrong = ~((features - expected).abs() <= tolerance * expected + floor).all(0)
    return frozenset(name for name, bad in zip(plan.names, wrong.tolist(), strict=True) if bad)


def _precision(truth: dict[str, Tensor]) -> float:
    """The relative rounding error of the coarsest of the gradients."""
    return max((torch.finfo(gradient.dtype).eps for gradient in truth.values()), default=0.0)


def _floor(truth: dict[str, Tensor]) -> float:
    """The squared norm up to which a gradient is rounding, as where it vanishes in exact arithmetic (a key's bias)."""
    largest = max((float(gradient.double().square().sum()) for gradient in truth.values()), default=0.0)
    return (1e3 * _precision(truth)) ** 2 * largest
