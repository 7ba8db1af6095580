"""One batch of samples that take one path through a model, and each use that its functions make of parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgrad._torch import functorch, in_dispatch_mode, lowered, next_number, pytree, saved_tensor_hooks
from fastgrad.layers.formula import Copies, Formula
from fastgrad.layers.probe import tap


class NotPerSampleError(ValueError):
    """The model has no gradient per sample, however it is run."""


#: The reason to run samples one by one if a checkpoint recomputes them in the backward pass.
CHECKPOINT = "a checkpoint computes it again after vmap is over"


def mixes_samples(what: str) -> NotPerSampleError:
    """Return the error for a model of which ``what`` depends on several samples of the batch."""
    return NotPerSampleError(f"model must not mix the samples of a batch, or there is no gradient per sample; {what}")


class Refused(Exception):  # noqa: N818 - the samples run alone instead
    """The model does something that cannot be followed on the batch; the message says what.

    ``hooked`` says whether a hook may make gradients disproportionate to those of the outputs.
    """

    def __init__(self, message: str, *, hooked: bool = False) -> None:
        super().__init__(message)
        self.hooked = hooked


class RuleError(Exception):
    """A rule is wrong in itself: running the samples alone would hide that."""


@dataclass(eq=False)
class Use:
    """One function that uses parameters: where the backward pass meets it, and by what formula."""

    probe: Tensor  # a zero, by whose id the backward pass finds the use
    keys: tuple[int, ...]  # ids of the function's parameters that count
    slots: tuple[int, ...]  # their places among the parameters of the formula
    formula: Formula


@dataclass(eq=False)
class Call:
    """The uses of parameters in one run of a model on ``samples`` samples, under one level of vmap.

    Rules get it as their first argument. ``parameters`` are those whose gradients are wanted, by id.
    """

    parameters: Mapping[int, Tensor]
    samples: int
    #: Whether tensors that the model creates hold a row for each sample, because it writes samples into them.
    batch_new_tensors: bool = False
    uses: list[Use] = field(default_factory=list)
    #: By the id of a parameter, the number of its uses.
    counts: dict[int, int] = field(default_factory=dict)
    #: Sequence numbers of the autograd nodes of functions whose uses were recorded.
    numbers: list[tuple[int, int]] = field(default_factory=list)
    #: The last error that is a rule's own, not one of PyTorch's functions.
    rule_failure: Exception | None = None
    #: The hooks of saved tensors when the run began.
    hooks: Any = field(default_factory=saved_tensor_hooks)
    level: int = 0
    #: Checkpoints inside, which compute again in the backward pass.
    checkpoints: list[weakref.ref[Any]] = field(default_factory=list)
    #: Bytes of what functions return for one sample, if they are counted.
    bytes: int = 0
    _copies: dict[int, Tensor] = field(default_factory=dict)

    def begin(self) -> None:
        """Take the present level of vmap as that of the samples."""
        self.level = functorch.maybe_current_level()

    def again(self) -> Call:
        """Return a call on the same samples that has the copies of parameters that this one has now, and no uses."""
        copies = dict(self._copies)
        return Call(self.parameters, self.samples, self.batch_new_tensors, level=self.level, _copies=copies)

    def owns(self, value: object) -> bool:
        """Whether a value is a parameter whose gradient is wanted."""
        return isinstance(value, Tensor) and id(value) in self.parameters

    def serves(self, *weights: Any) -> bool:
        """Whether each weight is a wanted parameter, None, or a constant that all samples share."""
        return all(w is None or self.owns(w) or not (self.is_batched(w) or w.requires_grad) for w in weights)

    def is_batched(self, value: object) -> bool:
        """Whether a value is a tensor with a row for each sample."""
        return (
            isinstance(value, Tensor)
            and functorch.is_batchedtensor(value)
            and functorch.maybe_get_level(value) == self.level
        )

    def require_level(self) -> None:
        """Raise Refused inside a transform of the model's own (``torch.func``)."""
        if functorch.maybe_current_level() != self.level:
            raise Refused("it uses parameters inside a transform of torch.func")

    def physical(self, value: Any) -> Any:
        """Return the batch ``(B, ...)`` behind a tensor of one sample; anything else as it is."""
        if not self.is_batched(value):
            return value
        dim, whole = functorch.maybe_get_bdim(value), functorch.get_unwrapped(value)
        return whole if dim == 0 else whole.movedim(dim, 0)

    def wrapped(self, tree: Any) -> Any:
        """Return tensors ``(B, ...)`` in a tree as those of one sample."""
        return pytree.tree_map_only(Tensor, lambda y: functorch._add_batch_dim(y, 0, self.level), tree)

    def spread(self, value: Tensor) -> Tensor:
        """Return the batch ``(B, ...)`` behind a tensor; the rows of a constant are equal."""
        own: Tensor = self.physical(value)
        return own if self.is_batched(value) else own.unsqueeze(0).expand(self.samples, *own.shape)

    def on_batch(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` one level lower, where tensors are batches, and wrap what it returns."""
        self.require_level()
        begin, uses = next_number(), len(self.uses)
        with lowered():
            out = function()
        if len(self.uses) > uses:
            self.numbers.append((begin, next_number()))
        return functorch._add_batch_dim(out, 0, self.level) if isinstance(out, Tensor) else self.wrapped(out)

    def apply(
        self, function: Callable[[Tensor], Tensor], input: Tensor, weights: Sequence[Any], formula: Formula
    ) -> Any:
        """Apply a function of ``weights`` to the batch of its ``input``; its ``formula`` needs only that input."""

        def on_batch() -> Any:
            x = self.spread(input)
            return self.tapped([function(x)], [x], weights, formula)[0]

        return self.on_batch(on_batch)

    def apply_to_images(
        self, function: Callable[[Tensor], Tensor], input: Tensor, weights: Sequence[Any], make: Callable[[int], Any]
    ) -> Any:
        """Do the same for n images ``(n, C, *L)`` per sample, folded into the batch; ``make(n)`` is the formula."""

        def on_batch() -> Any:
            x = self.spread(input)
            images = x.shape[1]
            x = x.flatten(0, 1)
            out = self.tapped([function(x)], [x], weights, make(images))[0]
            return out.unflatten(0, (self.samples, images))

        return self.on_batch(on_batch)

    def tapped(
        self, outputs: Sequence[Tensor], saved: Sequence[Tensor], weights: Sequence[Any], formula: Formula,
        *, in_place: bool = True,
    ) -> list[Tensor]:  # fmt: skip
        """Pass outputs ``(B, ...)`` of a function of ``weights`` through a tap, and record the use.

        ``saved`` are the tensors that the formula needs. To be called inside `on_batch`, which notes the graph's nodes.
        """
        slots = tuple(k for k, w in enumerate(weights) if w is not None and id(w) in self.parameters)
        if not slots:
            return list(outputs)
        keys = tuple(id(weights[k]) for k in slots)
        probe = torch.zeros((), device=outputs[0].device, requires_grad=True)
        self.uses.append(Use(probe, keys, slots, formula))
        for key in keys:
            self.counts[key] = self.counts.get(key, 0) + 1
        # A selective checkpoint stores results of functions, and needs them as they were.
        return tap(outputs, saved, probe, in_place=in_place and not in_dispatch_mode())

    def copy_of(self, parameter: Tensor) -> Tensor:
        """Return one copy of a parameter per sample, whose gradient is each sample's own; no memory is written."""
        key = id(parameter)
        if key not in self._copies:

            def expand() -> Tensor:
                copies = parameter.unsqueeze(0).expand(self.samples, *parameter.shape)
                return self.tapped([copies], [], [parameter], COPIES, in_place=False)[0]

            self._copies[key] = self.on_batch(expand)
        return self._copies[key]


COPIES = Copies()
