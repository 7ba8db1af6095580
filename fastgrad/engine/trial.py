"""Making a plan: choose routes for what a model does with a few samples, and compare what they find with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgrad.batches import take
from fastgrad.engine.backward import order_by_parameter, probe_grads
from fastgrad.engine.copy import detach_plain
from fastgrad.engine.given import unwritten
from fastgrad.engine.layout import SAMPLES
from fastgrad.engine.memory import lacks_memory
from fastgrad.engine.plan import Known, Plan, PlanConstraints, Planner
from fastgrad.engine.probe import GraphedError
from fastgrad.engine.run import OffPlanError, Run
from fastgrad.engine.samples import Check, Samples, precision_of, rounding
from fastgrad.engine.state import NotRepeatableError, undone

if TYPE_CHECKING:
    from fastgrad.engine.network import Network


class Trial:
    """A model on ``count`` samples of its inputs, the first ones again where there are fewer."""

    def __init__(
        self, network: Network, known: Known, args: Any, kwargs: Any, samples: int, count: int = SAMPLES
    ) -> None:
        self._network, self._known = network, known
        self._samples = Samples(network, known, args, kwargs, samples, count)
        self._planners = [Planner(seen, known) for seen in self._samples.seen]
        named = network.model.named_parameters() if self._samples.unseen else []
        self._zeros = frozenset(name for name, p in named if not p.any())

    def plan(self, older: Plan | None = None) -> Plan:
        """A plan that agrees with autograd.

        ``older`` serves parameters which the present path does not use; it is left out if it does not agree.

        Raises:
            ValueError: If the model does not treat the samples of a batch independently, or not alike each time.
        """
        constraints: PlanConstraints | None = PlanConstraints()
        wrong: frozenset[str] = frozenset()
        # Each turn gives up more of what may fail, of which there is finitely much.
        while constraints is not None:
            plan = self._candidate(constraints, older)
            failure: Exception | None = None
            try:
                inputs, count, checks = self._samples.inputs, self._samples.count, self._samples.checks
                wrong = frozenset().union(*(self._disagreeing(plan, check, inputs, count) for check in checks))
            except NotRepeatableError:
                raise
            except OffPlanError as error:
                wrong = frozenset(error.parameters)
            except GraphedError:
                # The model itself takes gradients, as forces are those of an energy.
                wrong = frozenset(plan.names)
            except Exception as error:
                if lacks_memory(error):
                    raise
                # Whatever a model raises that is given one copy of a parameter per sample, or mapped over samples.
                failure = error
            if failure is None and not wrong:
                return plan
            if older is not None:
                older = None
            elif failure is None:
                constraints = constraints.after_disagreement(wrong)
            else:
                constraints = constraints.after_error(plan)
                if constraints is None:
                    if isinstance(failure, ValueError):
                        raise failure
                    raise ValueError(
                        "model must bear to run again on single samples, or with one copy of a parameter for each of "
                        f"them; in a trial it raised {type(failure).__name__}: {failure}"
                    ) from failure
        gradients = [gradient for check in self._samples.checks for gradient in check.truth.values()]
        if not all(g.to(torch.promote_types(g.dtype, torch.float32)).square().sum().isfinite() for g in gradients):
            raise ValueError(
                "model must have finite gradients on the samples of a first call, which it is checked with; those of "
                f"{', '.join(sorted(wrong))} held NaN or infinity, or have squared norms above 3e38. Look at the first "
                "samples of the batch"
            )
        raise ValueError(
            "model must treat the samples of a batch independently, alike each time: squared norms of "
            f"{', '.join(sorted(wrong))} disagree with autograd"
        )

    def serves_one(self, plan: Plan) -> bool:
        """Whether ``plan`` agrees with autograd on one sample alone as well; that path then is one of the plan's."""
        samples = self._samples
        one = take(samples.inputs, slice(0, 1), samples.count, self._known.carriers)
        with torch.enable_grad():
            seen = samples.observed(one, 1, training=self._known.training)
            cotangents = samples.cotangents(self._network.tensors(seen.output), 1, 0)
            truth = samples.backward(seen, cotangents)
        try:
            return not self._disagreeing(plan, Check(0, cotangents, truth), one, 1)
        except OffPlanError:
            return False

    def _candidate(self, constraints: PlanConstraints, older: Plan | None) -> Plan:
        first, *others = self._planners
        plan = first.plan(constraints)
        for planner in others:
            unused = [name for name in plan.names if plan.routes[name].route == "zero"]
            plan = plan.joined(planner.plan(constraints, unused))
        plan = replace(plan, outputs=self._samples.layouts, zeros=self._zeros, linear=self._samples.linear)
        return plan if older is None else plan.joined(older)

    def _disagreeing(self, plan: Plan, check: Check, inputs: Any, count: int) -> frozenset[str]:
        """Parameters whose squared norms are not those of one sample's true gradient, and zero for the others."""
        with torch.enable_grad(), undone(self._network.model):
            features = self._features(plan, check.cotangents, inputs, count)
        truth = {name: gradient.to(features.dtype).square().sum() for name, gradient in check.truth.items()}
        zero = features.new_zeros(())
        expected = torch.zeros_like(features)
        expected[check.sample] = torch.stack([truth.get(name, zero) for name in plan.names])
        # A wrong route is wrong by a factor; this is no test of accuracy.
        precision = max(self._samples.seen[-1].precision, precision_of(check.truth))
        tolerance = min(0.5, 1e4 * precision) if precision > 1e-6 else 1e-2
        agree = ((features - expected).abs() <= tolerance * expected + rounding(check.truth)).all(0)
        return frozenset(name for name, good in zip(plan.names, agree.tolist(), strict=True) if not good)

    def _features(self, plan: Plan, cotangents: Sequence[Tensor], inputs: Any, count: int) -> Tensor:
        """Squared norms ``(B, P)`` as the plan finds them; its path becomes one of the plan's."""
        run = Run(count)
        # With the user's own parameters, PyTorch's layers take the path of parameters that need gradients.
        shared = self._network.shared
        output, _ = self._network.once(
            plan, run, *unwritten(inputs),
            parameter=_apart if shared else detach_plain, training=shared or self._known.training,
        )  # fmt: skip
        if run.left is not None:
            raise run.left
        assert run.steps is not None
        plan.paths.add(run.steps.path())
        outputs = self._network.tensors(output)
        pairs = [(out, rows) for out, rows in zip(outputs, cotangents, strict=True) if out.requires_grad]
        probes = run.probes if pairs else []
        norms = probe_grads([out for out, _ in pairs], [probe for _, probe in probes], [row for _, row in pairs])
        signals = [
            (torch.zeros_like(probe) if value is None else value).unsqueeze(0)
            for (_, probe), value in zip(probes, norms, strict=True)
        ]
        return order_by_parameter(probes, signals, plan.names, outputs[0].detach()[None], count)[0]


def _apart(parameter: nn.Parameter) -> Tensor:
    """A copy that shares memory, and needs gradients where ``parameter`` does."""
    return detach_plain(parameter).requires_grad_(parameter.requires_grad)
