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
from fastgrad.batches import as_call, batch_size, one_for_none
from fastgrad.blocks.block import Block
from fastgrad.blocks.forward import Pass
from fastgrad.blocks.subject import Subject, watch
from fastgrad.memory import keep_freed_memory

Inputs = Tensor | Mapping[str, Any]


class Extraction:
    """Computes logits and blocks of inputs, with one shared forward pass.

    The model is only read, in evaluation mode (`fastgrad.evaluation.Evaluated`).

    Args:
        model: Any classifier whose output `fastgrad.batches.logits_of` can read.
        blocks: What to extract; names must differ.
        log: Whether squared norms are returned as logarithms.
        subject: What is known of the network and its inputs; None watches it at the first call.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], *, log: bool = True, subject: Subject | None = None
    ) -> None:
        self.model, self.blocks, self.log, self.subject = original(model), tuple(blocks), log, subject
        self._lock = threading.Lock()
        self._shapes: dict[str, torch.Size] = {}
        #: What blocks keep between calls, by their names.
        self.kept: dict[str, Any] = {}
        keep_freed_memory()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out the lock and what blocks keep, which copies and pickles make anew."""
        return functools.partial(Extraction, log=self.log, subject=self.subject), (self.model, self.blocks)

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
            subject = self._watched(args, kwargs)
            if subject.mask is not None and subject.mask not in kwargs:
                raise ValueError(f"inputs must have {subject.mask!r}, as those of fit had")
            mask = None if subject.mask is None else kwargs[subject.mask]
            readings = {block.name: block.readings(subject, mask) for block in self.blocks}
            samples = max(samples, 1)
            try:
                forward = Pass(self.model, readings, subject, args, kwargs, samples, log=self.log, kept=self.kept)
            except Exception as error:
                if (mismatch := subject.mismatch(x)) is None:
                    raise
                raise ValueError(mismatch) from error
            logits, values = forward.logits, {block.name: self._values(block, forward) for block in self.blocks}
        return (logits[:0], {n: v[:0] for n, v in values.items()}) if empty else (logits, values)

    def _watched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Subject:
        """Return what is known of the network and inputs like these; ValueError if they cannot serve a block."""
        with self._lock:
            if self.subject is None:
                subject = watch(self.model, args, kwargs)
                for block in self.blocks:
                    refusal = block.refusal(subject)
                    if refusal is not None:
                        served = f"{type(self.model).__name__} with this input"
                        raise ValueError(f"blocks must be ones that {served} can serve; {block.name!r}: {refusal}")
                self.subject = subject
            return self.subject

    def of(self, blocks: Sequence[Block]) -> Extraction:
        """Return an extraction of other blocks from the same network, which is not watched again."""
        other = Extraction(self.model, blocks, log=self.log, subject=self.subject)
        other._shapes = self._shapes
        return other

    def _values(self, block: Block, forward: Pass) -> Tensor:
        """Return a block's values, or NaN, which no score takes for usual, if the block worked before and now fails."""
        try:
            checks.is_tensor(f"values of the block {block.name!r}", values := block.values(forward))
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
            return forward.logits.new_full((forward.samples, *shape), torch.nan)
        self._shapes[block.name] = values.shape[1:]
        return values


def arguments(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the model's arguments, detached from any graph."""
    outside: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, Tensor.detach, as_call(x))
    return outside
