"""Compute logits and named blocks from a network and its inputs, in one run from which every block is read."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrad import checks
from fastgrad._torch import is_traced, original, outside_of_compilation, pytree
from fastgrad.batches import as_call, batch_size, logits_of, one_for_none
from fastgrad.blocks.block import Block, Reading
from fastgrad.blocks.subject import Subject, watch
from fastgrad.evaluation import Evaluated, Hook
from fastgrad.memory import keep_freed_memory

Inputs = Tensor | Mapping[str, Any]


class Pass:
    """A forward pass of B ``samples``, and what the blocks of an extraction read in it."""

    def __init__(self, extraction: Extraction, subject: Subject, args: Any, kwargs: Any, samples: int) -> None:
        if subject.mask is not None and subject.mask not in kwargs:
            raise ValueError(f"inputs must have {subject.mask!r}, as those of fit had")
        mask = None if subject.mask is None else kwargs[subject.mask]
        self.extraction, self.subject, self.log = extraction, subject, extraction.log
        self.args, self.kwargs, self.samples = args, kwargs, samples
        self._network = Evaluated(extraction.model)
        self._readings = {block.name: block.readings(subject, mask) for block in extraction.blocks}
        self._values: dict[Reading, Tensor] = {}
        readings = [reading for each in self._readings.values() for reading in each]
        hooks = [(self._network.model.get_submodule(reading.path), self._hook(reading)) for reading in readings]
        #: ``(B, N)``.
        self.logits = logits_of(self._network.run(args, kwargs, hooks))
        for reading in readings:
            if reading not in self._values:
                raise RuntimeError(f"the forward pass did not call {reading.path!r}, which was to be read")

    def _hook(self, reading: Reading) -> Hook:
        def read(inputs: tuple[Any, ...], output: Any) -> None:
            value = reading.function(inputs, output)
            if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != self.samples:
                was = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"the reading of {reading.path!r} must be a tensor with one row for each of {self.samples} "
                    f"samples; it was {was}"
                )
            self._values[reading] = value.detach().clone() if reading.copied else value

        return read

    def readings(self, name: str) -> list[Tensor]:
        """Return what a block's readings saw, in the block's order."""
        return [self._values[reading] for reading in self._readings[name]]

    def image(self) -> Tensor:
        """Return the one image tensor among the inputs."""
        place = self.subject.image
        assert place is not None  # or the block would have refused
        image: Tensor = self.args[place] if isinstance(place, int) else self.kwargs[place]
        return image

    def again(self, image: Tensor) -> Tensor:
        """Return logits ``(B, N)`` of the same batch with another image, from one more forward pass."""
        place = self.subject.image
        args = tuple(image if i == place else value for i, value in enumerate(self.args))
        kwargs = {name: image if name == place else value for name, value in self.kwargs.items()}
        return logits_of(self._network.run(args, kwargs))


class Extraction:
    """Computes logits and blocks of inputs, with one shared forward pass.

    The model is only read, in evaluation mode (`fastgrad.evaluation.Evaluated`).

    Args:
        model: Any classifier whose output `fastgrad.batches.logits_of` can read.
        blocks: What to extract; names must differ.
        log: Whether squared norms are returned as logarithms.
        known: What is known of the network and its inputs; None watches it at the first call.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], *, log: bool = True, known: Subject | None = None
    ) -> None:
        self.model, self.blocks, self.log, self.known = original(model), tuple(blocks), log, known
        self._lock = threading.Lock()
        self._shapes: dict[str, torch.Size] = {}
        #: What blocks keep between calls, by their names.
        self.kept: dict[str, Any] = {}
        keep_freed_memory()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out the lock and what blocks keep, which copies and pickles make anew."""
        return functools.partial(Extraction, log=self.log, known=self.known), (self.model, self.blocks)

    def __call__(self, x: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits ``(B, N)`` and blocks of a batch; ValueError if a block cannot serve this network or input."""
        # A compiler does not follow hooks; `fastgrad.export` records a graph of an extraction.
        return outside_of_compilation(self._run)(x)

    def _run(self, x: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = arguments(x)
            samples = batch_size(args, kwargs)
            empty = samples == 0
            if empty:
                args, kwargs = one_for_none((args, kwargs))
            subject = self.subject(args, kwargs)
            found = Pass(self, subject, args, kwargs, 1 if empty else samples)
            logits, values = found.logits, {block.name: self._values(block, found) for block in self.blocks}
        return (logits[:0], {n: v[:0] for n, v in values.items()}) if empty else (logits, values)

    def subject(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Subject:
        """Return what is known of the network and inputs like these; ValueError if they cannot serve a block."""
        with self._lock:
            if self.known is None:
                subject = watch(self.model, args, kwargs)
                for block in self.blocks:
                    refusal = block.refusal(subject)
                    if refusal is not None:
                        served = f"{type(self.model).__name__} with this input"
                        raise ValueError(f"blocks must be ones that {served} can serve; {block.name!r}: {refusal}")
                self.known = subject
            return self.known

    def of(self, blocks: Sequence[Block]) -> Extraction:
        """Return an extraction of other blocks from the same network, which is not watched again."""
        other = Extraction(self.model, blocks, log=self.log, known=self.known)
        other._shapes = self._shapes
        return other

    def _values(self, block: Block, found: Pass) -> Tensor:
        """Return a block's values, or NaN, which no score takes for usual, if the block worked before and now fails."""
        try:
            checks.is_tensor(f"values of the block {block.name!r}", values := block.values(found))
            if not values.dim():
                raise ValueError(f"blocks must hold a row for each sample; {block.name!r} has one number for a batch")
            values = values.detach()
        except Exception as error:
            shape = self._shapes.get(block.name)
            if shape is None or is_traced():
                raise
            warnings.warn(
                f"the block {block.name!r} failed on a batch, whose uncertainty is infinite: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return found.logits.new_full((found.samples, *shape), torch.nan)
        self._shapes[block.name] = values.shape[1:]
        return values


def arguments(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the model's arguments, detached from any graph."""
    outside: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, Tensor.detach, as_call(x))
    return outside
