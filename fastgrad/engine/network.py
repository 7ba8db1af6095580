"""A network with its plans, one for each path that it takes, and its forward passes with probes by these plans."""

from __future__ import annotations

import contextlib
import enum
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad._torch import disable_mha_fastpath, is_traced, own_parametrizations, pytree, saving_plainly
from fastgrad.batches import choices
from fastgrad.engine.copy import BACKWARD_HOOKS, Shadow, detach_plain
from fastgrad.engine.fallback import floating
from fastgrad.engine.layout import SAMPLES
from fastgrad.engine.memory import keep_freed_memory, lacks_memory
from fastgrad.engine.objects import Objects, objects_kept
from fastgrad.engine.plan import Known, Plan, Route
from fastgrad.engine.refusals import refuse_mixing, refuse_parts
from fastgrad.engine.run import BroadcastSite, OffPlanError, Reading, Run
from fastgrad.engine.state import Snapshot
from fastgrad.engine.steps import Steps, noting
from fastgrad.engine.trial import Trial

#: Structures of inputs whose plans are kept, and plans kept for each, because one may not serve all paths.
_STRUCTURES_KEPT = 16
_PLANS_KEPT = 4


class Network:
    """Runs a model with probes; only reads it, and holds it weakly.

    ``names`` returns names of the wanted parameters by id, in order; by default of all. ``tensors`` returns the tensors
    of an output whose gradients matter. With ``recorded``, passes are the user's own calls. They use the model's own
    parameters, and its mode instead of evaluation mode.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Callable[[], dict[int, str]] | None = None,
        tensors: Callable[[Any], list[Tensor]] = floating,
        *,
        recorded: bool = False,
    ) -> None:
        self._model = weakref.ref(model)
        self.names = names or (lambda: {id(p): name for name, p in self.model.named_parameters()})
        self.tensors, self.recorded = tensors, recorded
        self._known: OrderedDict[Any, Known] = OrderedDict()
        self._lock = threading.Lock()
        keep_freed_memory()

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        model = self._model()
        assert model is not None
        return model

    def plan(self, args: Any, kwargs: Any, samples: int) -> Plan:
        """Return the plan for inputs of this structure, made and checked at a first call; ValueError if none holds."""
        # A layer's mode or statistics may have changed since the network was made.
        refuse_mixing(self.model, training=self.recorded)
        known = self._structure((args, kwargs), samples)
        with self._lock:
            if known.plans and not known.plans[0].outdated(self.model):
                return known.plans[0]
            known.plans.clear()
        with self._planning() as objects:
            plan = self._first_plan(known, (args, kwargs), samples, objects)
        # Not left to `forward`, which compiled passes do not call once they have a graph.
        self._keep(plan)
        return plan

    def routes(self) -> list[Route]:
        """Return the routes of the latest plan; RuntimeError if there is none yet."""
        with self._lock:
            plans = [plan for known in reversed(self._known.values()) for plan in known.plans]
        if not plans:
            raise RuntimeError("a report needs one call first: routes depend on the structure of the inputs")
        return list(plans[0].routes.values())

    def forward(self, plan: Plan | None, run: Run, args: Any, kwargs: Any, *, readings: Sequence[Reading] = ()) -> Any:
        """Run a forward pass of a private copy, and collect its probes and readings in ``run``.

        A pass that leaves its plan begins again with another one, known or new. Without a plan, a pass has no sites and
        needs neither observation nor trial. ValueError if no plan holds for its path, RuntimeError if a module to be
        read was not called.
        """
        if plan is None:
            output, shadow = self.once(None, run, (args, kwargs), readings)
        else:
            output, shadow = self._on_plan(plan, run, (args, kwargs), readings)
        if self.recorded:
            shadow.write_back()
        return output

    def _on_plan(self, plan: Plan, run: Run, inputs: Any, readings: Sequence[Reading]) -> tuple[Any, Shadow]:
        """Run a pass by ``plan``, or by other plans until it keeps to one."""
        modules = [module for ref in plan.known.modules if (module := ref()) is not None]
        before = Snapshot(modules, training=self.recorded, inputs=inputs)
        objects, late = Objects(self.model) if plan.known.counts else None, False
        tried: list[Plan] = []
        raised: Exception | None = None
        reason = ""
        for candidate in self._candidates(plan, tried, inputs, run.samples):
            raised, reason = None, "calls other functions, or on other parameters, than when it was planned"
            try:
                output, shadow = self.once(candidate, run, inputs, readings)
                if run.left is None and (run.steps is None or run.steps.path() in candidate.paths):
                    self._keep(candidate)
                    if run.steps is not None:
                        run.steps.settle(undo=False)
                    break
            except OffPlanError as left:
                reason = left.args[0]
            except Exception as error:
                if not candidate.replaces or is_traced() or lacks_memory(error):
                    raise
                # The model may fail on what the plan gives it in place of a parameter.
                raised, reason = error, f"raises {type(error).__name__}: {error}"
            if is_traced():
                raise ValueError(
                    f"model must take the path of an ordinary call while its graph is recorded; it {reason}"
                )
            if run.steps is not None:
                run.steps.settle(undo=True)
            if objects is None:
                objects, late = Objects(self.model), True
            objects.restore()
            try:
                before.restore()
            except ValueError:
                # So the same call, made again, gets a plan of its own.
                plan.known.plans.clear()
                raise
            tried.append(candidate)
        else:
            raise raised or ValueError(
                "model must take the same path each time it is given the same inputs; a call that was planned "
                f"on its own {run.samples} samples {reason}"
            )
        plan.known.counts = objects is not None and bool(objects.changed())
        if objects is not None and late and plan.known.counts:
            # What the first pass wrote is not known, so it cannot be undone.
            objects.restore()
            raise ValueError(
                "model must not write to lists, dicts or counters in a call whose path was not seen before, where no "
                "earlier call did. Make the same call again, with these as they were"
            )
        return output, shadow

    @contextlib.contextmanager
    def _planning(self) -> Iterator[Objects]:
        """Keep the caller's hooks from tensors that trials save; give the model's objects, restored at the end."""
        with saving_plainly(), objects_kept(self.model) as objects:
            yield objects

    def _first_plan(self, known: Known, inputs: Any, samples: int, objects: Objects) -> Plan:
        """Make a plan. Ambiguous inputs are taken to carry the batch such that the model treats its samples alike."""
        refusal: ValueError | None = None
        plans: list[Plan] = []
        options = list(choices(pytree.tree_leaves(inputs), samples))
        try:
            for carriers in options:
                try:
                    trial = Trial(self, known, inputs, samples, carriers, objects)
                    plans.append(trial.plan())
                    if len(options) == 1 or trial.holds_in_batch():
                        return plans[-1]
                except ValueError as error:
                    # Prefer the refusal of an option that the model can run with, if there is one.
                    if refusal is None or (refusal.__cause__ is not None and error.__cause__ is None):
                        refusal = error
            if plans:
                return plans[0]
            assert refusal is not None
            raise refusal
        finally:
            # Its traceback refers to this frame, which would be a cycle.
            del refusal

    def _candidates(self, plan: Plan, tried: Sequence[Plan], inputs: Any, samples: int) -> Iterator[Plan]:
        """Yield ``plan``, other known plans, and then new ones; a plan comes again only with new paths."""
        yield plan
        while others := [other for other in plan.known.plans if all(other is not one for one in tried)]:
            yield others[0]
        # The few samples that a plan is tried on may take another path than the batch.
        for count in (SAMPLES, samples + 1, max(2, samples)):
            with self._planning() as objects:
                trial = Trial(self, plan.known, inputs, samples, plan.carriers, objects, count)
                made = trial.plan(older=plan)
            same = next((other for other in tried if other == made), None)
            if same is None:
                yield made
            elif not made.paths <= same.paths:
                same.paths.update(made.paths)
                yield same
        # Finding the batch takes two samples at least, on which a loop over samples has another path.
        with self._planning():
            serves = samples == 1 and trial.serves_one(made)
        if serves:
            yield made

    def once(
        self, plan: Plan | None, run: Run, inputs: Any, readings: Sequence[Reading] = (), *, trial: bool = False
    ) -> tuple[Any, Shadow]:
        """Try a forward pass; return its output and the copy that ran. A ``trial`` runs on detached parameters."""
        run.begin(plan)
        sites = () if plan is None else plan.sites
        spread = {id(self.model.get_parameter(s.parameters[0])): s for s in sites if isinstance(s, BroadcastSite)}
        own = self.recorded and not trial

        def stand_in(parameter: nn.Parameter) -> Tensor:
            value = parameter if own else detach_plain(parameter)
            if self.recorded and trial:
                # So that PyTorch's layers take the same path as in the user's own call.
                value.requires_grad_(parameter.requires_grad)
            return spread[id(parameter)].spread(run, value) if id(parameter) in spread else value

        with own_parametrizations(), torch.set_grad_enabled(plan is not None or torch.is_grad_enabled()):
            shadow = Shadow(self.model, stand_in, training=self.recorded, recorded=self.recorded, apart=not own)
            if not self.recorded:
                for copy in shadow.modules.values():
                    disable_mha_fastpath(copy)
            # A hook attached later runs earlier, so readings see what the module itself returned.
            for place in (*sites, *readings):
                place.attach(run, shadow)
            if plan is None or is_traced():
                output = shadow(*inputs[0], **inputs[1])
            else:
                with noting(Steps(shadow.stand_ins())) as run.steps:
                    output = shadow(*inputs[0], **inputs[1])
        run.closed = True
        for reading in readings:
            if reading not in run.readings and run.left is None:
                raise RuntimeError(f"the forward pass did not call {reading.path!r}, which was to be read")
        return output, shadow

    def _structure(self, inputs: Any, samples: int) -> Known:
        """Return what is known for inputs of this structure, with the model's present modules, modes and hooks."""
        names, modules = self.names(), list(self.model.modules())
        modes = tuple(module.training and self.recorded for module in modules)
        # Functions that the model calls do not show what hooks do to gradients.
        tables = ("_forward_pre_hooks", "_forward_hooks", *(BACKWARD_HOOKS if self.recorded else ()))
        hooks = tuple(
            (id(module), getattr(hook, "__code__", type(hook)))
            for module in modules
            for table in tables
            for hook in vars(module)[table].values()
        )
        key = (_kind(inputs, samples), tuple(map(id, modules)), tuple(names.items()), modes, hooks)
        # A trial of one sample cannot see whether other samples change its outputs. A graph makes no trial.
        keys = [(*key, False), (*key, True)] if is_traced() or samples == 1 else [(*key, False)]
        with self._lock:
            for one in keys:
                known = self._known.get(one)
                # Another module may have got the id of one that is gone.
                if known and all(ref() is not None for ref in known.modules) and (known.plans or one is keys[-1]):
                    self._known.move_to_end(one)
                    return known
        # Parameters may have been sharded since the network was made.
        refuse_parts(self.model)
        known = Known(any(modes), names, list(map(weakref.ref, modules)))
        with self._lock:
            self._known[keys[-1]] = known
            while len(self._known) > _STRUCTURES_KEPT:
                self._known.popitem(last=False)
        return known

    def _keep(self, plan: Plan) -> None:
        """Make ``plan`` the first to be tried."""
        plans = plan.known.plans
        if not plans or plans[0] is not plan:
            with self._lock:
                plans[:] = [plan, *(other for other in plans if other is not plan)][:_PLANS_KEPT]


def _kind(inputs: Any, samples: int) -> Any:
    """Return what a plan depends on: the structure of the inputs and their switches, not numbers, nor sizes except 0.

    A graph without edges, for example, does not mix its nodes.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    kinds = tuple(
        (leaf.dim(), leaf.dtype, leaf.device, leaf.numel() > 0, leaf.dim() > 0 and bool(leaf.shape[0] == samples))
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, (bool, str, enum.Enum, type(None)))
        else type(leaf)
        for leaf in leaves
    )
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    return str(spec), kinds, tuple(torch.is_autocast_enabled(device) for device in sorted(devices))
