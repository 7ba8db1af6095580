"""Watching a model on a few samples, none of which may change what it does with another."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastgrad._torch import pytree
from fastgrad.batches import take
from fastgrad.engine.copy import Shadow, detach_plain
from fastgrad.engine.fallback import agree
from fastgrad.engine.given import unwritten
from fastgrad.engine.layout import CHOSEN, SAMPLES, find_layout, probe_cotangent
from fastgrad.engine.memory import lacks_memory
from fastgrad.engine.observe import Observation
from fastgrad.engine.state import undone

if TYPE_CHECKING:
    from fastgrad.engine.network import Network
    from fastgrad.engine.plan import Known


#: Observations of some of the samples among others, and which of all samples these are.
_Others = Sequence[tuple[Observation, range]]


class Check(NamedTuple):
    """The gradient of one sample.

    Attributes:
        sample: Its number.
        cotangents: What is sent back from each output: zero but in its rows.
        truth: By name, what autograd finds for each parameter.
    """

    sample: int
    cotangents: list[Tensor]
    truth: dict[str, Tensor]


class Samples:
    """What a model does with ``count`` samples of its inputs, the first ones again where there are fewer.

    Attributes:
        inputs: The samples.
        count: How many they are.
        seen: What the model does with them in evaluation mode, and in training mode where a module is in it.
        layouts: Where the batch lies in each output; None where it is not found.
        checks: The gradients of some of them.
        unseen: Whether a parameter that is used has no gradient in these.
        linear: Whether gradients are in proportion to those of the outputs.

    Raises:
        ValueError: If other samples change what the model returns for one, or its gradients.
    """

    def __init__(self, network: Network, known: Known, args: Any, kwargs: Any, samples: int, count: int) -> None:
        self._network, self._known, self.count = network, known, count
        index = torch.arange(count, device="cpu") % samples
        inputs = pytree.tree_map_only(Tensor, detach_plain, (args, kwargs))
        indices = (index, index[:-1], index[-1:].expand(count))
        self.inputs, self._less, self._last = (take(inputs, i, samples, known.carriers) for i in indices)
        self._alone, self._whole = samples == 1, (inputs, samples)
        with torch.enable_grad():
            self.seen = []
            # What may be used is planned in evaluation mode, which skips no layer by chance. Whether it holds is seen
            # in the mode that will run, with the same random numbers as the trial.
            for training in (False, True) if known.training else (False,):
                seen, others = self._observe(training=training)
                self.seen.append(seen)
            self.checks, self.unseen = self._gradients(seen)
            self._require_own_gradients(others, training=known.training)
            self.linear = self._is_linear(seen)

    def observed(self, inputs: Any, count: int, fewer: Observation | None = None, **options: bool) -> Observation:
        """What the model does with ``inputs``; ``options`` as for `Observation`. It is left as it was."""
        model = self._network.model
        with undone(model):
            return Observation(model, unwritten(inputs), count, fewer, recorded=self._network.shared, **options)

    def backward(self, seen: Observation, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """The gradients by name of what was observed. The model is left as it was: a checkpoint runs a part again."""
        with undone(self._network.model):
            return seen.backward(self._network.tensors(seen.output), cotangents)

    def cotangents(self, outputs: Sequence[Tensor], samples: int, chosen: int) -> list[Tensor]:
        """What is sent back for one of the samples that the outputs hold."""
        # A sample alone may give fewer outputs.
        pairs = zip(outputs, self.layouts, strict=False)
        return [probe_cotangent(out, layout, samples, chosen) for out, layout in pairs]

    def _observe(self, *, training: bool) -> tuple[Observation, _Others]:
        """What the model does with the samples, and with some of them among others."""

        def observe(inputs: Any, count: int, fewer: Observation | None = None) -> Observation:
            try:
                return self.observed(inputs, count, fewer, training=training)
            except Exception as error:
                if lacks_memory(error):
                    raise
                self._require_broken(training=training)
                raise ValueError(
                    "model must take any number of samples, rows of dimension 0 of its first tensor, and be followed "
                    f"on its way (no torch.cond, no nested tensors but jagged ones); given {count} of "
                    f"{self._whole[1]} samples in a trial it raised {type(error).__name__}: {error}"
                ) from error

        fewer = observe(self._less, self.count - 1)
        seen = observe(self.inputs, self.count, fewer)
        outputs, less = (self._network.tensors(each.output) for each in (seen, fewer))
        if len(outputs) != len(less):
            raise ValueError(
                "model must return tensors that carry the batch; it returned more of them for more samples, as a list "
                "with one for each"
            )
        self.layouts = tuple(
            find_layout(tuple(a.shape), tuple(b.shape), None, self.count) for a, b in zip(outputs, less, strict=True)
        )
        if self._alone:
            return seen, []
        # One sample may decide for all, as the largest: it is not among both the first samples and the last alone.
        last = observe(self._last, self.count)
        others = [(fewer, range(self.count - 1)), (last, range(self.count - 1, self.count))]
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
            for out, one, layout in zip(outputs, again, self.layouts, strict=True):
                if layout is None or layout.kind == "single":
                    continue
                expected = layout.batch_first(out.detach(), seen.samples)[rows]
                if not agree(layout.batch_first(one.detach(), other.samples)[rows], expected, precision):
                    raise ValueError(
                        "model must treat the samples of a batch independently; what it returns for a sample changes "
                        "with the other samples of the batch. A sample is a row of dimension 0 of the inputs"
                    )

    def _require_own_gradients(self, others: _Others, *, training: bool) -> None:
        """Raise ValueError unless a sample has the same gradients among other samples, and among fewer."""
        for other, samples in others:
            check = next(check for check in self.checks if check.sample in samples)
            changed = _changed(check.truth, self._again(other, check))
            if changed:
                # Gradients that vanish in exact arithmetic, as those of a saturated softmax, are rounding alone.
                rounded = self.observed(self.inputs, self.count, training=training, rounded=True)
                _refuse(changed - _changed(check.truth, self._again(rounded, check)))

    def _again(self, seen: Observation, check: Check) -> dict[str, Tensor]:
        """The gradients of a check's sample among others, as many or fewer."""
        outputs = self._network.tensors(seen.output)
        cotangents = [
            torch.zeros_like(out) if layout is None else rows.narrow(layout.dim, 0, out.shape[layout.dim])
            for out, rows, layout in zip(outputs, check.cotangents, self.layouts, strict=True)
        ]
        return self.backward(seen, cotangents)

    def _gradients(self, seen: Observation) -> tuple[list[Check], bool]:
        """The gradients of some samples, and whether a parameter that is used has none in all of them.

        The chosen sample comes first, whose gradient shows where modules have the batch. A second one follows: where
        one sample decides for all, as by the largest value in the batch, the gradient of that one reaches no other.
        Others follow as long as a parameter is left that none of them has a gradient of, beyond rounding.
        """
        if all(layout is None or layout.kind == "single" for layout in self.layouts):
            raise ValueError(
                "model must return a floating-point tensor that carries the batch in one dimension, alone or in "
                "tuples, lists and dicts; it returned none, as a model does that returns one loss of all samples"
            )
        checks = []
        idle = {name for name, p in seen.parameters.items() if p.requires_grad}
        idle &= set(self._known.names.values())
        for sample in dict.fromkeys((CHOSEN, self.count - 1, *range(min(self.count, SAMPLES)))):
            cotangents = self.cotangents(self._network.tensors(seen.output), self.count, sample)
            truth = self.backward(seen, cotangents)
            checks.append(Check(sample, cotangents, truth))
            floor = rounding(truth)
            idle -= {name for name, gradient in truth.items() if bool(gradient.square().sum() > floor)}
            idle = {name for name in idle if seen.uses[name]}
            if len(checks) > 1 and self.count >= SAMPLES and not idle:
                break
        gradients = [check.truth[name] for check in checks for name in idle if name in check.truth]
        return checks, bool(idle) and not all(bool(gradient.any()) for gradient in gradients)

    def _is_linear(self, seen: Observation) -> bool:
        """Whether larger gradients of the outputs give gradients of parameters that are larger by the same factor.

        Raises:
            ValueError: If they are not, and other samples decide, as where gradients are divided by their largest.
        """
        # The last one shows what begins at a size.
        factors = (1, 8) if seen.precision > 1e-6 else (1, 32, 1024)

        def at(factor: int, check: Check) -> list[Tensor]:
            return [factor * rows for rows in check.cotangents]

        first, *others = self.checks
        larger = self.backward(seen, at(factors[-1], first))
        sizes = [(_size(first.truth[name]), _size(gradient) / factors[-1] ** 2) for name, gradient in larger.items()]
        floor = rounding(first.truth)
        if not any(abs(again - size) > 0.1 * size + floor for size, again in sizes):
            return True
        if self._alone:
            return False
        # At one size alone, what mixes may be saturated, or less than the rounding of parameters that it spares.
        for factor in factors:
            # Of another size each, so that one decides.
            one, other = at(factor, first), at(2 * factor, others[0])
            sums = self.backward(seen, one)
            sums = {name: sums[name] + gradient for name, gradient in self.backward(seen, other).items()}
            _refuse(_changed(self.backward(seen, list(map(operator.add, one, other))), sums))
        return False


def _changed(truth: dict[str, Tensor], sums: dict[str, Tensor]) -> set[str]:
    """Names of gradients that differ by more than a hundredth or so."""
    floor = rounding(truth)
    pairs = {name: (sums.get(name, torch.zeros_like(gradient)), gradient) for name, gradient in truth.items()}
    return {name for name, (other, one) in pairs.items() if _size(other - one) > 0.01 * _size(one) + floor}


def _refuse(changed: set[str]) -> None:
    """Raise ValueError if there are any."""
    if changed:
        raise ValueError(
            "model must treat the samples of a batch independently; a sample's gradients of "
            f"{', '.join(sorted(changed))} change with the other samples of the batch, or with their number"
        )


def precision_of(tensors: dict[str, Tensor]) -> float:
    """The relative rounding error of the coarsest of the tensors."""
    return max((torch.finfo(tensor.dtype).eps for tensor in tensors.values()), default=0.0)


def rounding(truth: dict[str, Tensor]) -> float:
    """The squared norm up to which a gradient is rounding, as where it vanishes in exact arithmetic (a key's bias)."""
    largest = max(map(_size, truth.values()), default=0.0)
    return (1e3 * precision_of(truth)) ** 2 * largest


def _size(gradient: Tensor) -> float:
    """The squared norm."""
    return float(gradient.double().square().sum())
