"""Make a plan: choose routes for what a model does with a few samples, and compare their norms with autograd.

No sample may change what the model does with another.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastgrad.batches import take
from fastgrad.engine.backward import backward_signals
from fastgrad.engine.fallback import agree
from fastgrad.engine.layout import CHOSEN, SAMPLES, find_layout, probe_cotangent
from fastgrad.engine.memory import lacks_memory
from fastgrad.engine.objects import Objects
from fastgrad.engine.observe import Observation
from fastgrad.engine.plan import Known, Plan, PlanConstraints, Planner
from fastgrad.engine.run import OffPlanError, Run
from fastgrad.engine.state import Copies, NotRepeatableError, undone

if TYPE_CHECKING:
    from fastgrad.engine.network import Network


#: Observations of some samples, each with the numbers of its samples among all of them.
_Others = Sequence[tuple[Observation, list[int]]]


class Check(NamedTuple):
    """The gradients ``truth`` of one sample by name, for ``cotangents`` that are zero outside of its rows."""

    sample: int
    cotangents: list[Tensor]
    truth: dict[str, Tensor]


class Trial:
    """A trial of a model on ``count`` samples of its inputs, the last one repeated if there are fewer.

    ``carriers`` says for each leaf of the inputs whether it carries the batch. Each pass restores ``objects`` first.

    Raise ValueError if other samples change what the model returns for one, or its gradients.
    """

    def __init__(
        self,
        network: Network,
        known: Known,
        inputs: Any,
        samples: int,
        carriers: Sequence[bool],
        objects: Objects,
        count: int = SAMPLES,
    ) -> None:
        self._network, self._known, self._carriers, self._count = network, known, tuple(carriers), count
        # In their own order, because the model may need them sorted by length.
        index = torch.arange(count, device="cpu").clamp(max=samples - 1)
        self._copies, self._objects = Copies(inputs), objects
        self._inputs = take(inputs, index, samples, carriers)
        # If the last one is repeated, it is among the others as well, so the first one is needed, too.
        self._singles = [[i] * count for i in ((0, count - 1) if samples < count else (count - 1,))]
        self._alone, self._whole = samples == 1, (inputs, samples)
        self._planners = []
        with torch.enable_grad():
            # Plans start from evaluation mode, which skips no layer at random. They are checked in the mode that will
            # run, with the same random numbers as the trial.
            for training in (False, True) if known.training else (False,):
                seen, others = self._observe(training=training)
                self._planners.append(Planner(seen, known))
            self._seen, self._precision = seen, seen.precision
            self._checks, unseen = self._gradients(seen)
            self._require_own_gradients(others, training=known.training)
            self._linear = self._is_linear(seen)
        self._zeros = frozenset(n for n, p in network.model.named_parameters() if unseen and not p.any())

    def plan(self, older: Plan | None = None) -> Plan:
        """Return a plan that agrees with autograd; ValueError if the model mixes samples, or varies between calls.

        ``older`` serves parameters that the present path does not use; it is left out if it does not agree.
        """
        calls = [call for planner in self._planners for call in planner.seen.calls]
        hooked = frozenset(call.path for call in calls if call.hooked)
        constraints: PlanConstraints | None = PlanConstraints(hooked=hooked)
        wrong: frozenset[str] = frozenset()
        # Each turn gives up more of what may fail, so the loop ends.
        while constraints is not None:
            plan = self._candidate(constraints, older)
            failure: Exception | None = None
            try:
                found = [self._disagreeing(plan, [check], self._inputs, self._count) for check in self._checks]
                wrong = frozenset().union(*found)
            except OffPlanError as error:
                # As after a layer whose output of one row was copied for each sample, as embeddings of positions are.
                wrong = frozenset(error.args[1])
            except Exception as error:
                if lacks_memory(error) or isinstance(error, NotRepeatableError):
                    raise
                # A model may raise anything if it gets one copy of a parameter per sample or runs under vmap. So may
                # sites if the model itself takes gradients, as forces from an energy.
                failure = error
            if failure is None and not wrong:
                # Autograd functions may fail on several gradients at once, or return wrong ones.
                together = self._agrees(plan, self._checks, self._inputs, self._count)
                return replace(plan, looped=not together)
            if older is not None:
                older = None
            elif failure is None and not wrong <= constraints.at_root:
                constraints = replace(constraints, at_root=constraints.at_root | wrong)
            else:
                # Under vmap a module may raise, or have wrong gradients, as with another view of a parameter's memory.
                constraints = constraints.after_failure(plan)
                if constraints is None and isinstance(failure, ValueError):
                    raise failure
                if constraints is None and failure is not None:
                    raise ValueError(
                        "model must bear to run again on single samples, or with one copy of a parameter for each of "
                        f"them; in a trial it raised {type(failure).__name__}: {failure}"
                    ) from failure
        raise ValueError(
            "model must treat the samples of a batch independently, alike each time: squared norms of "
            f"{', '.join(sorted(wrong))} disagree with autograd"
        )

    def holds_in_batch(self) -> bool:
        """Whether the samples have the same outputs in the whole batch, where later rows of other inputs may matter."""
        inputs, samples = self._whole
        with torch.enable_grad():
            whole = self._observed(inputs, samples, training=self._known.training)
        index = [min(i, samples - 1) for i in range(self._count)]
        return whole.drew or self._alike(whole, self._seen, index)

    def serves_one(self, plan: Plan) -> bool:
        """Whether ``plan`` agrees with autograd on one sample alone as well; adds that path to the plan's."""
        one = take(self._inputs, slice(0, 1), self._count, self._carriers)
        with torch.enable_grad():
            check = self._check(self._observed(one, 1, training=self._known.training), 0)
        return self._agrees(plan, [check], one, 1)

    def _agrees(self, plan: Plan, checks: Sequence[Check], inputs: Any, count: int) -> bool:
        """Whether a pass by ``plan``, and one backward pass for all ``checks`` together, agree with autograd."""
        try:
            return not self._disagreeing(plan, checks, inputs, count)
        except Exception as error:
            if lacks_memory(error):
                raise
            return False

    def _candidate(self, constraints: PlanConstraints, older: Plan | None) -> Plan:
        first, *others = self._planners
        plan = first.plan(constraints)
        for planner in others:
            plan = plan.joined(planner.plan(constraints, plan.unused()))
        plan = replace(plan, outputs=self._layouts, zeros=self._zeros, linear=self._linear, carriers=self._carriers)
        return plan if older is None else plan.joined(older)

    def _disagreeing(self, plan: Plan, checks: Sequence[Check], inputs: Any, count: int) -> frozenset[str]:
        """Return parameters whose squared norms are not the true ones of a check's sample, or not zero for others.

        Gradients of several checks go back together. The path of the pass is added to the plan's.
        """
        run = Run(count)
        with torch.enable_grad(), self._undone(inputs) as inputs:
            output, _ = self._network.once(plan, run, inputs, trial=True)
            assert run.steps is not None
            plan.paths.add(run.steps.path())
            outputs = self._network.tensors(output)
            cotangents = [torch.stack(rows) for rows in zip(*(check.cotangents for check in checks), strict=True)]
            signals = backward_signals(run, outputs, cotangents)
        wrong: set[str] = set()
        for check, features in zip(checks, signals, strict=True):
            truth = {name: gradient.to(features.dtype).square().sum() for name, gradient in check.truth.items()}
            zero = features.new_zeros(())
            expected = torch.zeros_like(features)
            expected[check.sample] = torch.stack([truth.get(name, zero) for name in plan.routes])
            # A wrong route is wrong by a factor; this is no test of accuracy.
            precision = max(self._precision, precision_of(check.truth))
            tolerance = min(0.5, max(1e-2, 1e4 * precision))
            # No rounding is allowed for unused parameters: an unseen function, as under a transform, may use them.
            used = features.new_tensor([route.route != "zero" for route in plan.routes.values()])
            right = ((features - expected).abs() <= tolerance * expected + rounding(check.truth) * used).all(0)
            wrong |= {name for name, good in zip(plan.routes, right.tolist(), strict=True) if not good}
        return frozenset(wrong)

    def _observed(self, inputs: Any, count: int, **options: Any) -> Observation:
        """Observe the model on ``inputs``, and leave it as it was; ``options`` as for `Observation`."""
        with self._undone(inputs) as inputs:
            return Observation(self._network, inputs, count, **options)

    def _undone(self, inputs: Any) -> AbstractContextManager[Any]:
        """Begin a pass as the call does, and undo it: an earlier pass may have filled a cache that copies share."""
        self._objects.restore()
        return undone(self._network.model, inputs, self._copies)

    def _backward(self, seen: Observation, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return gradients by name, and leave the model as it was, because checkpoints run parts of it again."""
        with undone(self._network.model):
            return seen.backward(cotangents)

    def _check(self, seen: Observation, sample: int) -> Check:
        # A sample alone may give fewer outputs.
        pairs = zip(seen.outputs, self._layouts, strict=False)
        cotangents = [probe_cotangent(out, layout, seen.samples, sample) for out, layout in pairs]
        return Check(sample, cotangents, self._backward(seen, cotangents))

    def _observe(self, *, training: bool) -> tuple[Observation, _Others]:
        """Observe the model on the samples, and on some of them among others."""

        def observe(samples: list[int], **options: Any) -> Observation:
            index = torch.tensor(samples, device="cpu")
            inputs, count = take(self._inputs, index, self._count, self._carriers), len(samples)
            try:
                return self._observed(inputs, count, training=training, **options)
            except Exception as error:
                if lacks_memory(error):
                    raise
                # If the model raises for all samples as well, raise that error.
                with self._undone(self._whole[0]) as whole:
                    self._network.once(None, Run(self._whole[1]), whole, trial=True)
                raise ValueError(
                    "model must take any number of samples, rows of dimension 0 of its first tensor, and be followed "
                    f"on its way (no torch.cond, no nested tensors but jagged ones); given {count} of "
                    f"{self._whole[1]} samples in a trial it raised {type(error).__name__}: {error}"
                ) from error

        less = list(reversed(range(self._count - 1)))
        try:
            fewer = observe(less)
        except ValueError:
            # The order may matter, as by length.
            less.reverse()
            fewer = observe(less)
        seen = observe(list(range(self._count)), fewer=fewer, less=less)
        if seen.made:
            raise ValueError(
                f"model must not make parameters in forward; it made {seen.made[0]!r}. Make them in __init__, or where "
                "a first call alone does so, make that call before"
            )
        if len(seen.outputs) != len(fewer.outputs):
            raise ValueError(
                "model must return tensors that carry the batch; it returned more of them for more samples, as a list "
                "with one for each"
            )
        self._layouts = tuple(
            find_layout(tuple(a.shape), tuple(b.shape), None, self._count)
            for a, b in zip(seen.outputs, fewer.outputs, strict=True)
        )
        if self._alone:
            return seen, []
        # One sample may decide for all, as the largest; not both the first samples and the last one alone contain it.
        others = [(fewer, less)]
        others += [(observe(samples), samples) for samples in self._singles]
        # Not all are comparable: values may choose another path, and random numbers come in another order.
        others = [pair for pair in others if not seen.drew and seen.functions == pair[0].functions]
        self._require_own_outputs(seen, others)
        return seen, others

    def _require_own_outputs(self, seen: Observation, others: _Others) -> None:
        """Raise ValueError unless samples have the same outputs among others; gradients hide detached statistics."""
        if not all(self._alike(seen, other, samples) for other, samples in others):
            raise ValueError(
                "model must treat the samples of a batch independently; what it returns for a sample changes "
                "with the other samples of the batch, or each time, as with a generator of its own. A sample "
                "is a row of dimension 0 of the inputs"
            )

    def _alike(self, seen: Observation, other: Observation, samples: list[int]) -> bool:
        """Whether samples of ``seen`` have the same outputs in ``other``."""
        precision = max(seen.precision, torch.finfo(torch.float32).eps)
        for out, one, layout in zip(seen.outputs, other.outputs, self._layouts, strict=True):
            if layout is not None and layout.kind != "single":
                expected = layout.batch_first(out.detach(), seen.samples)[samples]
                rows = layout.batch_first(one.detach(), other.samples)
                if rows.shape != expected.shape or not agree(rows, expected, precision):
                    return False
        return True

    def _require_own_gradients(self, others: _Others, *, training: bool) -> None:
        """Raise ValueError unless a sample has the same gradients among other samples, and among fewer."""
        for other, samples in others:
            check = next((check for check in self._checks if check.sample in samples), None)
            if check and (changed := _changed(check.truth, self._again(other, samples, check))):
                # Gradients that vanish in exact arithmetic, as those of a saturated softmax, are nothing but rounding.
                rounded = self._observed(self._inputs, self._count, training=training, rounded=True)
                _refuse(changed - _changed(check.truth, self._again(rounded, range(self._count), check)))

    def _again(self, seen: Observation, samples: Sequence[int], check: Check) -> dict[str, Tensor]:
        """Return the gradients of a check's sample in an observation of ``samples``."""
        cotangents = [torch.zeros_like(out) for out in seen.outputs]
        for rows, whole, layout in zip(cotangents, check.cotangents, self._layouts, strict=True):
            if layout is not None:
                size = rows.shape[layout.dim] // len(samples)
                place = max(i for i, sample in enumerate(samples) if sample == check.sample)
                own = whole.narrow(layout.dim, check.sample * size, size)
                rows.narrow(layout.dim, place * size, size).copy_(own)
        return self._backward(seen, cotangents)

    def _gradients(self, seen: Observation) -> tuple[list[Check], bool]:
        """Return checks of some samples, and whether a used parameter has only rounding in them, and zeros in one.

        The chosen sample comes first: its gradient shows where modules have the batch. A second one follows, because
        one sample may decide for all, as by the largest value, and its own gradient then reaches no other. More follow
        while a used parameter has no gradient beyond rounding in any of them.
        """
        if all(layout is None or layout.kind == "single" for layout in self._layouts):
            raise ValueError(
                "model must return a floating-point tensor that carries the batch (the rows of its first input tensor) "
                "in one dimension, alone or in tuples, lists and dicts; it returned none, as a model does that returns "
                "one loss of all samples, or takes a tensor for each sample"
            )
        checks = []
        wanted = set(self._known.names.values())
        idle = {name for name, p in seen.parameters.items() if p.requires_grad and seen.uses[name]} & wanted
        for sample in dict.fromkeys((CHOSEN, self._count - 1, *range(min(self._count, SAMPLES)))):
            check = self._check(seen, sample)
            checks.append(check)
            _require_finite(check.truth, wanted)
            floor = rounding(check.truth)
            idle -= {name for name, gradient in check.truth.items() if bool(gradient.square().sum() > floor)}
            if len(checks) > 1 and self._count >= SAMPLES and not idle:
                break
        gradients = [check.truth[name] for check in checks for name in idle if name in check.truth]
        return checks, bool(idle) and not all(bool(gradient.any()) for gradient in gradients)

    def _is_linear(self, seen: Observation) -> bool:
        """Whether gradients of parameters are in proportion to those of the outputs.

        Raise ValueError if they are not and depend on other samples, as when gradients are divided by their largest.
        """
        # The last one shows effects that begin at a certain size, as of clipping.
        factors = (1, 8) if seen.precision > 1e-6 else (1, 32, 1024)

        def at(factor: int, check: Check) -> list[Tensor]:
            return [factor * rows for rows in check.cotangents]

        first, *others = self._checks
        larger = self._backward(seen, at(factors[-1], first))
        sizes = [(_size(first.truth[name]), _size(gradient) / factors[-1] ** 2) for name, gradient in larger.items()]
        floor = rounding(first.truth)
        if not any(abs(again - size) > 0.1 * size + floor for size, again in sizes):
            return True
        if self._alone:
            return False
        # At a single size, mixing may be saturated, or smaller than the rounding of parameters that it leaves alone.
        for factor in factors:
            # Of different sizes, so that one of the two samples decides.
            one, other = at(factor, first), at(2 * factor, others[0])
            sums = self._backward(seen, one)
            sums = {name: sums[name] + gradient for name, gradient in self._backward(seen, other).items()}
            _refuse(_changed(self._backward(seen, list(map(operator.add, one, other))), sums))
        return False


def _require_finite(truth: dict[str, Tensor], wanted: set[str]) -> None:
    """Raise ValueError unless the squared norms of all wanted gradients are finite: NaN agrees with nothing."""
    sizes = {n: g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for n, g in truth.items()}
    if lost := [name for name, size in sizes.items() if name in wanted and not size.isfinite()]:
        raise ValueError(
            "model must have finite gradients on the samples of a first call, which it is checked with; those of "
            f"{', '.join(sorted(lost))} held NaN or infinity, or have squared norms above 3e38. Look at the first "
            "samples of the batch"
        )


def _changed(truth: dict[str, Tensor], sums: dict[str, Tensor]) -> set[str]:
    """Return names of gradients whose difference has more than a hundredth of their squared norm."""
    floor = rounding(truth)
    pairs = {name: (sums.get(name, torch.zeros_like(gradient)), gradient) for name, gradient in truth.items()}
    return {name for name, (other, one) in pairs.items() if _size(other - one) > 0.01 * _size(one) + floor}


def _refuse(changed: set[str]) -> None:
    """Raise ValueError if any gradients changed."""
    if changed:
        raise ValueError(
            "model must treat the samples of a batch independently; a sample's gradients of "
            f"{', '.join(sorted(changed))} change with the other samples of the batch, or with their number"
        )


def precision_of(tensors: dict[str, Tensor]) -> float:
    """Return the relative rounding error of the coarsest of the tensors' dtypes."""
    return max((torch.finfo(tensor.dtype).eps for tensor in tensors.values()), default=0.0)


def rounding(truth: dict[str, Tensor]) -> float:
    """Return the squared norm below which a gradient may be rounding of an exact zero, as that of a key's bias."""
    largest = max(map(_size, truth.values()), default=0.0)
    # In half precision the first bound would be as large as the gradients.
    return min(1e3 * precision_of(truth), 0.03) ** 2 * largest


def _size(gradient: Tensor) -> float:
    """Return the squared norm."""
    return float(gradient.double().square().sum())
