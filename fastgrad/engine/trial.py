"""Making a plan: watch a model on a few samples, choose routes, and compare what they find with autograd."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgrad._torch import pytree
from fastgrad.batches import take
from fastgrad.engine.backward import order_by_parameter, probe_grads
from fastgrad.engine.copy import Shadow, detach_plain
from fastgrad.engine.fallback import agree
from fastgrad.engine.given import unwritten
from fastgrad.engine.layout import CHOSEN, SAMPLES, find_layout, probe_cotangent
from fastgrad.engine.observe import Observation
from fastgrad.engine.plan import Known, Plan, PlanConstraints, Planner
from fastgrad.engine.probe import GraphedError
from fastgrad.engine.run import OffPlanError, Run
from fastgrad.engine.state import NotRepeatableError, undone

if TYPE_CHECKING:
    from fastgrad.engine.network import Network


#: Observations of some of the samples among others, and which of a trial's these are.
_Others = Sequence[tuple[Observation, range]]


class _Check(NamedTuple):
    """The gradient of one sample.

    Attributes:
        sample: Its number.
        cotangents: What is sent back from each output: zero but in its rows.
        truth: By name, what autograd finds for each parameter.
    """

    sample: int
    cotangents: list[Tensor]
    truth: dict[str, Tensor]


class Trial:
    """A model on ``count`` samples of its inputs, the first ones again where there are fewer."""

    def __init__(
        self, network: Network, known: Known, args: Any, kwargs: Any, samples: int, count: int = SAMPLES
    ) -> None:
        self._network, self._known, self._count = network, known, count
        index = torch.arange(count) % samples
        inputs = pytree.tree_map_only(Tensor, detach_plain, (args, kwargs))
        indices = (index, index[:-1], index[-1:].expand(count))
        self._more, self._less, self._last = (take(inputs, i, samples, known.carriers) for i in indices)
        self._alone, self._whole = samples == 1, (inputs, samples)
        with torch.enable_grad():
            seen, others = self._observe(training=False)
            self._planners = [Planner(seen, known)]
            if known.training:
                # What may be used is planned in evaluation mode, which skips no layer by chance. Whether it holds is
                # seen in the mode that will run, with the same random numbers as the trial.
                seen, others = self._observe(training=True)
                self._planners.append(Planner(seen, known))
            outputs, self._precision = network.tensors(seen.output), seen.precision
            self._checks, unseen = self._gradients(seen, outputs)
            self._require_own_gradients(others, training=known.training)
            self._linear = self._is_linear(seen, outputs)
            named = network.model.named_parameters() if unseen else []
            self._zeros = frozenset(name for name, p in named if not p.any())

    def _observe(self, *, training: bool) -> tuple[Observation, _Others]:
        """What the model does with the samples, and with some of them among others.

        Raises:
            ValueError: If the other samples change what it returns for one.
        """
        options = {"training": training, "recorded": self._network.shared}

        def observe(inputs: Any, count: int, fewer: Observation | None = None) -> Observation:
            try:
                with undone(self._network.model):
                    return Observation(self._network.model, unwritten(inputs), count, fewer, **options)
            except Exception as error:
                self._require_broken(training=training)
                raise ValueError(
                    "model must take any number of samples, and be followed on its way (no torch.cond, no nested "
                    f"tensors but jagged ones); given {count} of {self._whole[1]} samples in a trial it raised "
                    f"{type(error).__name__}: {error}"
                ) from error

        fewer = observe(self._less, self._count - 1)
        seen = observe(self._more, self._count, fewer)
        outputs, less = (self._network.tensors(each.output) for each in (seen, fewer))
        if len(outputs) != len(less):
            raise ValueError(
                "model must return tensors that carry the batch; it returned more of them for more samples, as a list "
                "with one for each"
            )
        self._layouts = tuple(
            find_layout(tuple(a.shape), tuple(b.shape), None, self._count) for a, b in zip(outputs, less, strict=True)
        )
        if self._alone:
            return seen, []
        # One sample may decide for all, as the largest: it is not among both the first samples and the last alone.
        last = observe(self._last, self._count)
        others = [(fewer, range(self._count - 1)), (last, range(self._count - 1, self._count))]
        # Values of a batch may choose another path; random numbers come in another order.
        others = [pair for pair in others if not seen.drew and seen.functions == pair[0].functions]
        self._require_own_outputs(seen, others)
        return seen, others

    def _require_broken(self, *, training: bool) -> None:
        """Raise what the model raises for all samples, if it does."""
        args, kwargs = unwritten(self._whole[0])
        with undone(self._network.model):
            Shadow(self._network.model, training=training, recorded=self._network.shared).root(*args, **kwargs)

    def _require_own_outputs(self, seen: Observation, others: _Others) -> None:
        """Raise ValueError unless samples have the same outputs among other samples.

        Gradients do not tell where they do not lead to the others: by statistics of the inputs, or detached ones.
        """
        precision = max(seen.precision, torch.finfo(torch.float32).eps)
        for other, samples in others:
            rows = slice(samples.start, samples.stop)
            outputs, again = (self._network.tensors(each.output) for each in (seen, other))
            for out, one, layout in zip(outputs, again, self._layouts, strict=True):
                if layout is None or layout.kind == "single":
                    continue
                own = layout.batch_first(out.detach(), seen.samples)[rows]
                if not agree(layout.batch_first(one.detach(), other.samples)[rows], own, precision):
                    raise ValueError(
                        "model must treat the samples of a batch independently; what it returns for a sample changes "
                        "with the other samples of the batch"
                    )

    def _require_own_gradients(self, others: _Others, *, training: bool) -> None:
        """Raise ValueError unless a sample has the same gradients among other samples, and among fewer."""
        for other, samples in others:
            check = next(check for check in self._checks if check.sample in samples)
            changed = _changed(check.truth, self._back(other, check))
            if changed:
                # Gradients that vanish in exact arithmetic, as those of a saturated softmax, are rounding alone.
                model, inputs = self._network.model, unwritten(self._more)
                with undone(model):
                    rounded = Observation(
                        model, inputs, self._count, training=training, recorded=self._network.shared, rounded=True
                    )
                _refuse(changed - _changed(check.truth, self._back(rounded, check)))

    def _back(self, seen: Observation, check: _Check) -> dict[str, Tensor]:
        """The gradients of a check's sample among others, as many or fewer."""
        outputs = self._network.tensors(seen.output)
        cotangents = [
            torch.zeros_like(out) if layout is None else rows.narrow(layout.dim, 0, out.shape[layout.dim])
            for out, rows, layout in zip(outputs, check.cotangents, self._layouts, strict=True)
        ]
        with undone(self._network.model):
            return seen.backward(outputs, cotangents)

    def _cotangents(self, outputs: Sequence[Tensor], samples: int, chosen: int) -> list[Tensor]:
        """What is sent back for one of the samples that the outputs hold."""
        # A sample alone may give fewer outputs.
        pairs = zip(outputs, self._layouts, strict=False)
        return [probe_cotangent(out, layout, samples, chosen) for out, layout in pairs]

    def _gradients(self, seen: Observation, outputs: Sequence[Tensor]) -> tuple[list[_Check], bool]:
        """The gradients of some samples, and whether a parameter that is used has none in all of them.

        The chosen sample comes first, whose gradient shows where modules have the batch. A second one follows: where
        one sample decides for all, as by the largest value in the batch, the gradient of that one reaches no other.
        Others follow as long as a parameter is left that none of them has a gradient of, beyond rounding.
        """
        if all(layout is None or layout.kind == "single" for layout in self._layouts):
            raise ValueError("model must return a floating-point tensor that carries the batch; it returned none")
        checks = []
        idle = {name for name, p in seen.parameters.items() if p.requires_grad}
        idle &= set(self._known.names.values())
        for sample in dict.fromkeys((CHOSEN, self._count - 1, *range(min(self._count, SAMPLES)))):
            cotangents = self._cotangents(outputs, self._count, sample)
            # A checkpoint runs a part of the model again.
            with undone(self._network.model):
                truth = seen.backward(outputs, cotangents)
            checks.append(_Check(sample, cotangents, truth))
            floor = _floor(truth)
            idle -= {name for name, gradient in truth.items() if bool(gradient.square().sum() > floor)}
            idle = {name for name in idle if seen.uses[name]}
            if len(checks) > 1 and self._count >= SAMPLES and not idle:
                break
        gradients = [check.truth[name] for check in checks for name in idle if name in check.truth]
        return checks, bool(idle) and not all(bool(gradient.any()) for gradient in gradients)

    def _is_linear(self, seen: Observation, outputs: Sequence[Tensor]) -> bool:
        """Whether larger gradients of the outputs give gradients of parameters that are larger by the same factor.

        Raises:
            ValueError: If they are not, and other samples decide, as where gradients are divided by their largest.
        """
        factor = 8 if seen.precision > 1e-6 else 1024
        # Of another size each, so that one decides.
        one, other = (
            [size * rows for rows in check.cotangents]
            for size, check in zip((factor, 2 * factor), self._checks, strict=False)
        )

        def back(cotangents: Iterable[Tensor]) -> dict[str, Tensor]:
            with undone(self._network.model):
                return seen.backward(outputs, list(cotangents))

        truth, larger = self._checks[0].truth, back(one)
        sizes = [(_size(truth[name]), _size(gradient) / factor**2) for name, gradient in larger.items()]
        floor = _floor(truth)
        if not any(abs(again - size) > 0.1 * size + floor for size, again in sizes):
            return True
        if self._alone:
            return False
        both = back(map(operator.add, one, other))
        _refuse(_changed(both, {name: larger[name] + gradient for name, gradient in back(other).items()}))
        return False

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
                wrong = frozenset().union(
                    *(self._disagreeing(plan, check, self._more, self._count) for check in self._checks)
                )
            except NotRepeatableError:
                raise
            except OffPlanError as error:
                wrong = frozenset(error.parameters)
            except GraphedError:
                # The model itself takes gradients, as forces are those of an energy.
                wrong = frozenset(plan.names)
            except Exception as error:
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
        if not all(gradient.isfinite().all() for check in self._checks for gradient in check.truth.values()):
            raise ValueError(
                "model must have finite gradients on the samples of a first call, which it is checked with; those of "
                f"{', '.join(sorted(wrong))} held NaN or infinity. Look at the first samples of the batch"
            )
        raise ValueError(
            "model must treat the samples of a batch independently, alike each time: squared norms of "
            f"{', '.join(sorted(wrong))} disagree with autograd"
        )

    def serves_one(self, plan: Plan) -> bool:
        """Whether ``plan`` agrees with autograd on one sample alone as well; that path then is one of the plan's."""
        model, training = self._network.model, self._known.training
        one = take(self._more, slice(0, 1), self._count, self._known.carriers)
        with torch.enable_grad(), undone(model):
            seen = Observation(model, unwritten(one), 1, training=training, recorded=self._network.shared)
            outputs = self._network.tensors(seen.output)
            cotangents = self._cotangents(outputs, 1, 0)
            truth = seen.backward(outputs, cotangents)
        try:
            return not self._disagreeing(plan, _Check(0, cotangents, truth), one, 1)
        except OffPlanError:
            return False

    def _candidate(self, constraints: PlanConstraints, older: Plan | None) -> Plan:
        first, *others = self._planners
        plan = first.plan(constraints)
        for planner in others:
            unused = [name for name in plan.names if plan.routes[name].route == "zero"]
            plan = plan.joined(planner.plan(constraints, unused))
        plan = replace(plan, outputs=self._layouts, zeros=self._zeros, linear=self._linear)
        return plan if older is None else plan.joined(older)

    def _disagreeing(self, plan: Plan, check: _Check, inputs: Any, count: int) -> frozenset[str]:
        """Parameters whose squared norms are not those of one sample's true gradient, and zero for the others."""
        with torch.enable_grad(), undone(self._network.model):
            features = self._features(plan, check.cotangents, inputs, count)
        truth = {name: gradient.to(features.dtype).square().sum() for name, gradient in check.truth.items()}
        zero = features.new_zeros(())
        expected = torch.zeros_like(features)
        expected[check.sample] = torch.stack([truth.get(name, zero) for name in plan.names])
        # A wrong route is wrong by a factor; this is no test of accuracy.
        precision = max(self._precision, _precision(check.truth))
        tolerance = min(0.5, 1e4 * precision) if precision > 1e-6 else 1e-2
        agree = ((features - expected).abs() <= tolerance * expected + _floor(check.truth)).all(0)
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
        found = [
            (torch.zeros_like(probe) if value is None else value).unsqueeze(0)
            for (_, probe), value in zip(probes, norms, strict=True)
        ]
        return order_by_parameter(probes, found, plan.names, outputs[0].detach()[None], count)[0]


def _apart(parameter: nn.Parameter) -> Tensor:
    """A copy that shares memory, and needs gradients where ``parameter`` does."""
    return detach_plain(parameter).requires_grad_(parameter.requires_grad)


def _changed(truth: dict[str, Tensor], found: dict[str, Tensor]) -> set[str]:
    """Names of gradients that differ by more than a hundredth or so."""
    floor = _floor(truth)
    pairs = {name: (found.get(name, torch.zeros_like(gradient)), gradient) for name, gradient in truth.items()}
    return {name for name, (other, one) in pairs.items() if _size(other - one) > 0.01 * _size(one) + floor}


def _refuse(changed: set[str]) -> None:
    """Raise ValueError if there are any."""
    if changed:
        raise ValueError(
            "model must treat the samples of a batch independently; a sample's gradients of "
            f"{', '.join(sorted(changed))} change with the other samples of the batch, or with their number"
        )


def _precision(truth: dict[str, Tensor]) -> float:
    """The relative rounding error of the coarsest of the gradients."""
    return max((torch.finfo(gradient.dtype).eps for gradient in truth.values()), default=0.0)


def _floor(truth: dict[str, Tensor]) -> float:
    """The squared norm up to which a gradient is rounding, as where it vanishes in exact arithmetic (a key's bias)."""
    largest = max(map(_size, truth.values()), default=0.0)
    return (1e3 * _precision(truth)) ** 2 * largest


def _size(gradient: Tensor) -> float:
    """The squared norm."""
    return float(gradient.double().square().sum())
